"""`--to`: our leaves, written as another package's files, are the same leaves when its reader opens them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightx2v.convert.cli import main
from lightx2v.integrations.diffusers import load_quantized_model
from lightx2v.io.declared import declare_layers, declared_layers
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from lightx2v.io.weights import Checkpoint, write_safetensors
from lightx2v.mm.scheme import parse
from lightx2v.quant.formats import dequantize_leaves, quantize_leaves, read_leaves, written_leaves
from lightx2v.quant.quanto import quanto_leaves
from tests.interop import msmodelslim_files
from tests.unit import convert_data

N, K = 48, 256
LAYER = "blocks.0.ffn.0"
Leaves = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BIAS, OTHER = random(N, seed=1), random(5, seed=2).bfloat16()
STATIC = {"input_scale": torch.tensor([0.031]), "input_zero": torch.tensor([-7.0])}
STEPWISE = STATIC | {"input_steps": torch.tensor([20, 10], dtype=torch.int32)}
OTHER_STEP = STATIC | {"input_steps": torch.tensor([20, 5], dtype=torch.int32)}
THREE_STEPS = {
    "input_scale": torch.tensor([0.03, 0.04, 0.05]),
    "input_zero": torch.tensor([-7.0, 1.0, 2.0]),
    "input_steps": torch.tensor([20, 10, 13, 17], dtype=torch.int32),
}
FP8_SGL = "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Auto-ActSgl"


def leaves_of(mm_type: str, k: int = K) -> Leaves:
    """A weight [N, k] as this engine writes it."""
    spec = parse(mm_type).weight
    assert spec is not None
    quantize = quanto_leaves if spec.dtype in ("int4", "int2") and not spec.symmetric else quantize_leaves
    return {leaf: tensor.contiguous() for leaf, tensor in written_leaves(quantize(random(N, k), spec), spec).items()}


def ours(folder: Path, mm_type: str, leaves: Leaves, bias: bool = True) -> Path:
    """One quantized layer and one other tensor in a file of this engine."""
    tensors = {f"{LAYER}.{leaf}": tensor for leaf, tensor in leaves.items()} | {"norm.weight": OTHER}
    path = folder / "ours.safetensors"
    write_safetensors(path, tensors | ({f"{LAYER}.bias": BIAS} if bias else {}), declare_layers({LAYER: mm_type}))
    return path


def exported(tmp_path: Path, to: str, mm_type: str, leaves: Leaves) -> Path:
    source = ours(tmp_path / "ours", mm_type, leaves)
    assert main(["--source", str(source), "--output", str(tmp_path / "theirs"), "--to", to]) == 0
    return tmp_path / "theirs"


def opened(folder: Path) -> Checkpoint:
    return open_any(folder, Wanted(lambda layer: True))


@pytest.mark.parametrize(
    ("to", "mm_type", "more", "read"),
    [
        ("angelslim", "fp8-pertensor", {}, "W-fp8-tensor-sym-A-fp8-tensor-sym-dynamic-Auto-ActAngelSlim"),
        ("angelslim", "fp8-pertensor-weight-only", {}, "fp8-pertensor-weight-only"),
        ("angelslim", "fp8", {}, "fp8"),
        ("angelslim", FP8_SGL, {}, FP8_SGL),
        ("angelslim", "fp8-b128", {}, "fp8-b128"),
        ("comfyui", "fp8-pertensor", {}, None),
        ("comfyui", "fp8-pertensor", {"input_scale": torch.tensor(0.5)}, None),
        ("quanto", "int8", {}, "int8-weight-only"),
        ("quanto", "fp8-weight-only", {}, "fp8-weight-only"),
        ("msmodelslim", "int8", {}, "int8"),
        ("msmodelslim", "int8-static-asym", STATIC, "int8-static-asym"),
        ("msmodelslim", "int8-timestep", STEPWISE, "int8-timestep"),
        ("msmodelslim", "int8-g128-asym", {}, "int8-g128-asym"),
        ("msmodelslim", "mxfp8", {}, "mxfp8"),
        ("msmodelslim", "mxfp4", {}, "mxfp4"),
        ("msmodelslim", "int8", {"input_multiplier": random(K, seed=3).abs() + 0.5}, "int8"),
        ("msmodelslim", "int8", {"lowrank_down": random(4, K, seed=4), "lowrank_up": random(N, 4, seed=5)}, "int8"),
    ],
)
def test_leaves_come_back_bit_by_bit(to: str, mm_type: str, more: Leaves, read: str | None, tmp_path: Path) -> None:
    leaves = leaves_of(mm_type) | more
    checkpoint = opened(exported(tmp_path, to, mm_type, leaves))
    renamed = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
    got = {name: tensor.clone() for name, tensor in checkpoint.stream() if name != "scaled_fp8"}
    got = {f"{name.rpartition('.')[0]}.{renamed.get(leaf := name.rpartition('.')[2], leaf)}": got[name] for name in got}
    wanted = {f"{LAYER}.{leaf}": tensor for leaf, tensor in leaves.items()}
    wanted |= {f"{LAYER}.bias": BIAS, "norm.weight": OTHER}
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        stored, flat = got[name], tensor.reshape(-1)
        assert torch.equal(stored.reshape(-1).view(torch.uint8), flat.view(torch.uint8)), name
        assert stored.shape == tensor.shape or stored.numel() == 1
    if read is not None:
        assert declared_layers(checkpoint.metadata) == {LAYER: read}


@pytest.mark.parametrize(
    ("mm_type", "k", "bits"),
    [("int4-g128-asym", 256, 4), ("int2-g128-asym", 256, 2), ("int4-channel-asym", 96, 4), ("int4-g96-asym", 288, 4)],
)
def test_quantos_few_bits(mm_type: str, k: int, bits: int, tmp_path: Path) -> None:
    leaves = leaves_of(mm_type, k)
    folder = exported(tmp_path, "quanto", mm_type, leaves)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    # value = code * scale - shift, where row r of the bits from i * `bits` on is row r + i * rows of the codes
    parts = [stored[f"{LAYER}.weight._data._data"] >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    scale, shift = (stored[f"{LAYER}.weight.{leaf}"].double() for leaf in ("_scale", "_shift"))
    values = (torch.cat(parts)[: len(scale)].double() * scale - shift).reshape(N, k)
    own = leaves["weight"]
    codes = torch.stack([own >> bit & (2**bits - 1) for bit in range(0, 8, bits)], dim=2).flatten(1).double()
    groups = codes.unflatten(1, (leaves["weight_scale"].shape[1], -1))
    wanted = (groups - leaves["weight_zero"].double().unsqueeze(2)) * leaves["weight_scale"].double().unsqueeze(2)
    torch.testing.assert_close(values, wanted.flatten(1), rtol=0, atol=1e-6)
    got = {name.rpartition(".")[2]: tensor.clone() for name, tensor in opened(folder).stream() if LAYER in name}
    assert torch.equal(got["weight"], own) and torch.equal(got["weight_scale"], leaves["weight_scale"])
    torch.testing.assert_close(got["weight_zero"], leaves["weight_zero"], rtol=2**-22, atol=0)
    types = json.loads((folder / "quanto_qmap.json").read_text())
    assert types == {LAYER: {"weights": f"qint{bits}", "activations": "none"}}


def test_what_msmodelslims_kernels_add(tmp_path: Path) -> None:
    leaves = leaves_of("int8-static-asym") | STATIC
    folder = exported(tmp_path, "msmodelslim", "int8-static-asym", leaves)
    stored = load_file(folder / "quant_model_weight_w8a8.safetensors")
    scale = STATIC["input_scale"].double() * leaves["weight_scale"].double().flatten()
    added = BIAS.double() / scale - leaves["weight"].double().sum(1) * STATIC["input_zero"].double()
    torch.testing.assert_close(stored[f"{LAYER}.deq_scale"].double(), scale, rtol=1e-6, atol=0)
    assert (stored[f"{LAYER}.quant_bias"].double() - added).abs().max() <= 0.51
    said = json.loads((folder / "quant_model_description_w8a8.json").read_text())
    assert said.pop("model_quant_type") == "W8A8" and said.keys() == stored.keys()
    assert {name for name, kind in said.items() if kind == "FLOAT"} == {f"{LAYER}.bias", "norm.weight"}
    made = msmodelslim_files.static(random(N, K), BIAS, STATIC["input_scale"], STATIC["input_zero"], legacy=True)
    assert {f"{LAYER}.{leaf}": (t.dtype, t.shape) for leaf, t in made.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in stored.items() if name.startswith(LAYER)
    }


def test_weights_alone_are_w8a16(tmp_path: Path) -> None:
    leaves = leaves_of("int8-weight-only")
    stored = load_file(
        exported(tmp_path, "msmodelslim", "int8-weight-only", leaves) / "quant_model_weight_w8a16.safetensors"
    )
    assert torch.equal(stored[f"{LAYER}.weight"], leaves["weight"]) and not stored[f"{LAYER}.weight_offset"].any()


def test_every_step_has_the_scale_of_the_middle(tmp_path: Path) -> None:
    leaves = leaves_of("int8-timestep") | STEPWISE
    folder = exported(tmp_path, "msmodelslim", "int8-timestep", leaves)
    stored = load_file(folder / "quant_model_weight_w8a8_timestep.safetensors")
    one = load_file(
        exported(tmp_path / "one", "msmodelslim", "int8-static-asym", leaves_of("int8-static-asym") | STATIC)
        / "quant_model_weight_w8a8.safetensors"
    )
    for leaf in ("input_scale", "input_offset", "deq_scale", "quant_bias"):
        got, wanted = stored[f"{LAYER}.{leaf}"], one[f"{LAYER}.{leaf}"]
        assert len(got) == 20 and all(torch.equal(step.reshape(-1), wanted.reshape(-1)) for step in got), leaf
    made = msmodelslim_files.static(random(N, K), BIAS, torch.ones(20), torch.zeros(20), legacy=True)
    assert all(stored[f"{LAYER}.{leaf}"].shape == tensor.shape for leaf, tensor in made.items())


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def in_rows(scales: Tensor, n: int, groups: int) -> Tensor:
    """[n, groups] of scales in the order of tensor cores (cuBLAS, "1D block scaling factors layout"), one by one."""
    flat, bands = scales.flatten(), -(-groups // 4)
    place = [
        [((r // 128) * bands + g // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + g % 4 for g in range(groups)]
        for r in range(n)
    ]
    return flat[torch.tensor(place)]


@pytest.mark.parametrize("k", [K, 96])
@pytest.mark.parametrize("scaled", [False, True])
def test_comfyuis_nvfp4(scaled: bool, k: int, tmp_path: Path) -> None:
    """The first code is in the high half of a byte, and scales of tensors are factors."""
    leaves = leaves_of("nvfp4", k) | ({"input_global_scale": torch.tensor(300.0)} if scaled else {})
    folder = exported(tmp_path, "comfyui", "nvfp4", leaves)
    stored = {name.removeprefix(f"{LAYER}."): t for name, t in load_file(next(folder.glob("*.safetensors"))).items()}
    assert json.loads(bytes(stored["comfy_quant"].tolist())) == {"format": "nvfp4"} and "scaled_fp8" not in stored
    assert ("input_scale" in stored) == scaled
    if scaled:
        assert stored["input_scale"].item() == pytest.approx(1 / 300)
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=torch.float64)
    codes = torch.stack((stored["weight"] >> 4, stored["weight"] & 15), dim=2).flatten(1)
    scales = in_rows(stored["weight_scale"].view(torch.uint8), N, k // 16).view(torch.float8_e4m3fn).double()
    values = table[codes.long()] * scales.repeat_interleave(16, dim=1) * stored["weight_scale_2"].double()
    assert float((values - random(N, k).double()).abs().max()) < 0.7
    spec = parse("nvfp4").weight
    assert spec is not None
    exact = dequantize_leaves(read_leaves(leaves, spec, N, k, ""), spec).double()
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=0)
    again = {leaf: stored[leaf] for leaf in stored if leaf not in ("bias", "norm.weight")}
    back = dequantize_leaves(read_leaves(again, spec, N, k, ""), spec).double()
    torch.testing.assert_close(back, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [K, 96])
def test_comfyuis_mxfp8(k: int, tmp_path: Path) -> None:
    leaves = leaves_of("mxfp8", k)
    folder = exported(tmp_path, "comfyui", "mxfp8", leaves)
    stored = load_file(next(folder.glob("*.safetensors")))
    assert json.loads(bytes(stored[f"{LAYER}.comfy_quant"].tolist())) == {"format": "mxfp8"}
    exponents = in_rows(stored[f"{LAYER}.weight_scale"], N, k // 32).double() - 127
    values = stored[f"{LAYER}.weight"].double() * torch.exp2(exponents).repeat_interleave(32, dim=1)
    spec = parse("mxfp8").weight
    assert spec is not None
    exact = dequantize_leaves(read_leaves(leaves, spec, N, k, ""), spec).double()
    assert stored[f"{LAYER}.weight"].dtype == torch.float8_e4m3fn and torch.equal(values, exact)
    assert float((values - random(N, k).double()).abs().max()) < 0.2


def test_what_does_not_go_into_one_file_of_angelslim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {f"{LAYER}.{leaf}": tensor for leaf, tensor in leaves_of("fp8").items()}
    tensors |= {f"blocks.1.ffn.0.{leaf}": tensor for leaf, tensor in leaves_of("fp8-b128").items()}
    types = {LAYER: "fp8", "blocks.1.ffn.0": "fp8-b128"}
    write_safetensors(tmp_path / "ours.safetensors", tensors, declare_layers(types))
    flags = ["--source", str(tmp_path / "ours.safetensors"), "--output", str(tmp_path / "theirs"), "--to", "angelslim"]
    assert main(flags) == 2
    assert "fp8-per-block and fp8-per-token" in capsys.readouterr().err and not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("mm_type", "quant_type"), [("fp8", "fp8-per-token"), ("fp8-b128", "fp8-per-block"), (FP8_SGL, "fp8-per-token-sgl")]
)
def test_the_drop_in_loads_angelslims_other_types(mm_type: str, quant_type: str, tmp_path: Path) -> None:
    leaves = leaves_of(mm_type)
    folder = exported(tmp_path, "angelslim", mm_type, leaves)
    (folder / "config.json").unlink(missing_ok=True)
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.Module()])
    net.blocks[0].ffn = nn.ModuleList([nn.Linear(K, N)])
    net.norm = nn.LayerNorm(5, bias=False, dtype=torch.bfloat16)
    loaded = load_quantized_model(net, folder)
    layer = loaded.get_submodule(LAYER)
    with safe_open(folder / "fp8_scales.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["quantization"])["quant_type"] == quant_type
    x, spec = random(7, K, seed=9), parse(mm_type).weight
    assert spec is not None
    exact = x.double() @ dequantize_leaves(leaves, spec).double().T + BIAS.double()
    with torch.no_grad():
        got = layer(x).double()
    assert float((got - exact).norm() / exact.norm()) < 0.05, "inputs are quantized"


def test_angelslims_second_file(tmp_path: Path) -> None:
    folder = exported(tmp_path, "angelslim", "fp8-pertensor", leaves := leaves_of("fp8-pertensor"))
    scales = load_file(folder / "fp8_scales.safetensors")
    assert scales.keys() == {f"{LAYER}.weight_scale"}
    assert scales[f"{LAYER}.weight_scale"].shape == () and scales[f"{LAYER}.weight_scale"] == leaves["weight_scale"]


@pytest.mark.parametrize(
    ("to", "mm_type", "more", "said"),
    [
        ("angelslim", "int8", {}, "is W-int8"),
        ("angelslim", "fp8-weight-only", {}, "is W-fp8-channel"),
        ("angelslim", "fp8-pertensor", {"input_scale": torch.tensor(0.5)}, "with 'input_scale'"),
        ("comfyui", "fp8-b128", {}, "is W-fp8-block128"),
        ("comfyui", "mxfp4", {}, "is W-mxfp4"),
        ("comfyui", "int8", {}, "is W-int8"),
        ("comfyui", "nvfp4", {"input_multiplier": torch.ones(K)}, "with 'input_multiplier'"),
        ("msmodelslim", "int8-timestep", OTHER_STEP, r"from the steps [5] of 20 on"),
        ("msmodelslim", "int8-timestep", THREE_STEPS, r"from the steps [10, 13, 17] of 20 on"),
        ("quanto", "int4-g128", {}, "is W-int4-group128"),
        ("quanto", "int4-g64-asym", {}, "K is 256"),
        ("quanto", "int8-static-asym", STATIC, "is W-int8"),
        ("quanto", "int8", {"input_multiplier": torch.ones(K)}, "with 'input_multiplier'"),
        ("msmodelslim", "nvfp4", {}, "is W-nvfp4"),
        ("msmodelslim", "fp8", {}, "is W-fp8"),
        ("msmodelslim", "int8", {"input_rotation": torch.tensor(32, dtype=torch.int32)}, "with 'input_rotation'"),
    ],
)
def test_what_a_package_cannot_hold(
    to: str, mm_type: str, more: Leaves, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ours(tmp_path, parse(mm_type).name, leaves_of(mm_type) | more)
    assert main(["--source", str(source), "--output", str(tmp_path / "theirs"), "--to", to]) == 2
    shown = capsys.readouterr().err
    assert f"layer '{LAYER}'" in shown and said in shown and "allowed: " in shown
    assert not (tmp_path / "theirs").exists()


def test_filling_is_not_taken_for_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = parse("int4-g128-asym").weight
    assert spec is not None
    leaves = written_leaves(quantize_leaves(random(N, 320), spec), spec)
    source = ours(tmp_path, "int4-g128-asym", leaves)
    assert main(["--source", str(source), "--output", str(tmp_path / "theirs"), "--to", "quanto"]) == 2
    assert "may be the filling" in capsys.readouterr().err
    assert not list((tmp_path / "theirs").glob("*"))


def test_a_converted_model_in_diffusers_names(tmp_path: Path) -> None:
    source = convert_data.write_wan(tmp_path / "source", convert_data.wan(dim=32, ffn=64))
    converted, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert convert_data.run(source, converted, "--quantized", "--linear_type", "int8") == 0
    assert convert_data.run(converted, theirs, "--to", "quanto", "--direction", "forward") == 0
    stored, own = load_file(theirs / "diffusion_pytorch_model.safetensors"), convert_data.read(converted)
    assert torch.equal(stored["blocks.1.attn1.to_q.weight._data"], own["blocks.1.self_attn.q.weight"])
    assert torch.equal(stored["patch_embedding.weight"], own["patch_embedding.weight"])
    assert json.loads((theirs / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"


@pytest.mark.parametrize("flags", [("--quantized", "--linear_type", "int8"), ("--verify",), ("--save_by_block",)])
def test_flags_that_do_not_go_with_it(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--source", str(tmp_path), "--output", "out", "--to", "quanto", *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_floats_are_not_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = convert_data.write_wan(tmp_path / "source", convert_data.wan())
    assert convert_data.run(source, tmp_path / "theirs", "--to", "quanto") == 2
    assert "no layer is quantized" in capsys.readouterr().err
