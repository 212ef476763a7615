"""Checkpoints of FLUX.1 in every layout, quantized and not, through the engine's own plan and loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v.components import empty_dit, fill_dit
from lightx2v.errors import CheckpointError
from lightx2v.io.source import CheckpointSource
from lightx2v.mm.linear import QuantLinear
from lightx2v.models.flux.dit import FluxDiT
from lightx2v.models.flux.keymap import PREFIX, SINGLE
from lightx2v.models.flux.spec import FLUX
from lightx2v.plan.dit import check_dit_tensors, linear_shapes
from lightx2v.plan.layers import ComponentPlan, plan_component
from lightx2v.platform import select_device
from tests.models import tiny_flux as tiny

CPU = select_device("cpu")
ARCH = tiny.tiny_dit().arch
FP8 = torch.float8_e4m3fn


def plan(path: Path, mm_type: str = "auto", auto_quant: bool = False) -> ComponentPlan:
    with torch.device("meta"):
        module = FLUX.build_dit(ARCH)
    checkpoint = FLUX.open(path)
    check_dit_tensors(module, checkpoint, FLUX.original_name, str(path))
    return plan_component(
        "dit",
        checkpoint,
        path,
        linear_shapes(module, FLUX),
        rename=FLUX.original_name,
        mm_type=mm_type,
        rules=(),
        auto_quant=auto_quant,
        fallback=True,
        device=CPU,
        dtype_bytes=4,
    )


def load(path: Path, mm_type: str = "auto", auto_quant: bool = False) -> FluxDiT:
    planned = plan(path, mm_type, auto_quant)
    source = CheckpointSource(FLUX.open(path), FLUX.original_name, FLUX.is_unused)
    dit = empty_dit(FLUX, ARCH, planned.by_name(), torch.float32, auto_quant)
    fill_dit(dit, source.read(), torch.device("cpu"), torch.float32, str(path))
    assert isinstance(dit, FluxDiT)
    return dit


@torch.no_grad()
def run(dit: FluxDiT) -> Tensor:
    return dit(*tiny.random_inputs(ARCH, 1, (3, 4)))


def scaled(state: dict[str, Tensor], everything: bool) -> dict[str, Tensor]:
    """As ComfyUI writes it: 8-bit weights with a scale each, of the blocks or of `everything` with two dimensions."""
    result = {"scaled_fp8": torch.zeros(2).to(FP8)}
    for name, tensor in state.items():
        in_block = "_blocks." in name
        if tensor.ndim == 2 and (in_block or everything):
            scale = tensor.abs().max() / 448
            result[name] = (tensor / scale).to(FP8)
            result[f"{name.removesuffix('.weight')}.scale_weight"] = scale
        else:
            result[name] = tensor.to(FP8) if everything and tensor.ndim == 2 else tensor
    return result


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floats that the 8-bit numbers of `state` stand for."""
    plain = {}
    for name, tensor in state.items():
        layer = name.rpartition(".")[0]
        if name != "scaled_fp8" and not name.endswith(".scale_weight"):
            scale = state.get(f"{layer}.scale_weight", torch.ones(())) if name.endswith(".weight") else torch.ones(())
            plain[name] = (tensor.float() * scale).bfloat16() if tensor.dtype == FP8 else tensor
    return plain


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_every_layout_is_one_model(layout: tiny.Layout, tmp_path: Path) -> None:
    path = tiny.write_dit(tiny.tiny_transformer(), tmp_path, layout)
    checkpoint = FLUX.open(path)
    exact = tiny.original_state(tiny.tiny_transformer())
    assert set(checkpoint.tensors) == set(exact)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in exact.items()
    }
    assert all(torch.equal(tensor, exact[name]) for name, tensor in checkpoint.stream())
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == sum(t.nbytes for t in exact.values())
    some = ["double_blocks.1.img_attn.qkv.weight", "final_layer.adaLN_modulation.1.bias", "img_in.bias"]
    assert {name for name, _ in checkpoint.stream(some)} == set(some)
    assert torch.equal(checkpoint.load(some[0]), exact[some[0]])


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_only_whole_tensors_are_found_in_files(layout: tiny.Layout, tmp_path: Path) -> None:
    path = tiny.write_dit(tiny.tiny_transformer(), tmp_path, layout)
    source = CheckpointSource(FLUX.open(path), FLUX.original_name, FLUX.is_unused)
    exact = tiny.original_state(tiny.tiny_transformer())
    found = {name: source.locate(name) for name in exact}
    for name, span in found.items():
        if span is not None:
            with span.file.open("rb") as stream:
                stream.seek(span.start)
                assert stream.read(span.nbytes) == exact[name].numpy().tobytes()
    absent = {name.rpartition(".")[0].rpartition(".")[2] for name, span in found.items() if span is None}
    assert absent == ({"qkv", "linear1", "1"} if layout == "diffusers" else set())


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("everything", [False, True])
def test_fp8_scaled_files(prefix: str, everything: bool, tmp_path: Path) -> None:
    state = scaled(tiny.original_state(tiny.tiny_transformer()), everything)
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "flux1-dev-fp8.safetensors")
    planned = plan(tmp_path / "flux1-dev-fp8.safetensors")
    assert {layer.mm_type for layer in planned.layers} == {"fp8-pertensor"}
    dit = load(tmp_path / "flux1-dev-fp8.safetensors")
    assert isinstance(dit.double_blocks[0].img_attn.qkv, QuantLinear)
    save_file(rounded(state), tmp_path / "rounded.safetensors")
    exact = run(load(tmp_path / "rounded.safetensors"))
    assert tiny.relative_error(run(dit), exact) < 0.05  # activations are quantized too
    kept = load_file(tmp_path / "rounded.safetensors")["img_in.weight"].float()
    assert torch.equal(dit.img_in.weight, kept)


def test_plain_casts_to_8_bits_are_floats(tmp_path: Path) -> None:
    state = {name: tensor.to(FP8) for name, tensor in tiny.original_state(tiny.tiny_transformer()).items()}
    save_file({f"{PREFIX}{name}": tensor for name, tensor in state.items()}, tmp_path / "flux1-dev-fp8.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "rounded.safetensors")
    assert {layer.mm_type for layer in plan(tmp_path / "flux1-dev-fp8.safetensors").layers} == {"Default"}
    dit = load(tmp_path / "flux1-dev-fp8.safetensors")
    assert torch.equal(run(dit), run(load(tmp_path / "rounded.safetensors")))


@pytest.mark.parametrize("mm_type", ["int8", "fp8", "fp8-pertensor", "fp8-b128"])
def test_floats_of_any_layout_are_quantized_alike(mm_type: str, tmp_path: Path) -> None:
    dits = [
        load(tiny.write_dit(tiny.tiny_transformer(), tmp_path / layout, layout), mm_type, auto_quant=True)
        for layout in tiny.LAYOUTS
    ]
    exact = run(tiny.tiny_dit())
    results = [run(dit) for dit in dits]
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert 0 < tiny.relative_error(results[0], exact) < 0.1


@pytest.mark.parametrize("mm_type", ["int8", "fp8"])
def test_quantized_layers_of_diffusers_are_put_together(mm_type: str, tmp_path: Path) -> None:
    """Scales per channel are those of the whole layer; one of a tensor serves the rows of its part."""
    folder = tiny.write_dit(tiny.tiny_transformer(), tmp_path, "diffusers")
    exact = run(load(folder, mm_type, auto_quant=True))
    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    limit, dtype = (127, torch.int8) if mm_type == "int8" else (448, FP8)
    for name, tensor in list(state.items()):
        if "transformer_blocks." in name and tensor.ndim == 2:
            scale = tensor.abs().amax(1, keepdim=True) / limit
            codes = tensor / scale
            state[name] = (codes.round() if mm_type == "int8" else codes).to(dtype)
            state[f"{name.removesuffix('weight')}weight_scale"] = scale
    save_file(state, tmp_path / "quantized.safetensors")
    assert {layer.mm_type for layer in plan(tmp_path / "quantized.safetensors").layers} == {mm_type}
    assert tiny.relative_error(run(load(tmp_path / "quantized.safetensors")), exact) < 0.005
    if mm_type == "int8":
        return
    for name in [name for name in state if name.endswith(".weight_scale")]:
        whole = state[name].max()
        weight = name.removesuffix("_scale")
        state[weight] = (state[weight].float() * state[name] / whole).to(dtype)
        state[name] = whole
    save_file(state, tmp_path / "quantized.safetensors")
    assert tiny.relative_error(run(load(tmp_path / "quantized.safetensors")), exact) < 0.05


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path) -> None:
    folder = tiny.write_dit(tiny.tiny_transformer(), tmp_path, "diffusers")
    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    path = tmp_path / "one.safetensors"
    block = "single_transformer_blocks.1"
    part, parts = f"{block}.attn.to_k.weight", [f"{block}.{name}" for name in SINGLE["linear1"]]
    for change, message in (
        ({part: None}, rf"'{part}' is missing"),
        ({part: state[part][:, :64].clone()}, "do not agree"),
        ({part: state[part].to(FP8)}, "do not agree"),
        ({f"{name}.weight_scale_2": torch.zeros(()) for name in parts}, "cannot be put together"),
        ({f"{name}.weight_scale": torch.zeros(3, 5) for name in parts}, "cannot be put together"),
        ({f"{parts[0]}.weight_scale": torch.zeros(())}, r"to_k\.weight_scale' is missing"),
    ):
        save_file({name: t for name, t in {**state, **change}.items() if t is not None}, path)
        with pytest.raises(CheckpointError, match=message):
            plan(path)
    save_file({name: t for name, t in state.items() if name != "x_embedder.bias"}, path)
    with pytest.raises(CheckpointError, match=r"img_in\.bias"):
        plan(path)
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="missing"):
        plan(path)
