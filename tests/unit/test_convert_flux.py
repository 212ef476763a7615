"""The converter on FLUX.1: every layout in, the original or diffusers' out, and what the engine makes of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v.config.load import load_config
from lightx2v.convert.opened import PieceReader
from lightx2v.convert.slabs import SLAB_ELEMENTS
from lightx2v.encoders import t5
from lightx2v.errors import ConfigError
from lightx2v.eval.metrics import psnr
from lightx2v.io.assembled import Assembled
from lightx2v.io.weights import Checkpoint
from lightx2v.models.flux.spec import FLUX
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.plan import resolve
from lightx2v.plan.dit import linear_shapes
from lightx2v.platform import select_device
from tests.e2e.flux_dirs import write_model
from tests.models import tiny_flux as tiny
from tests.models.lora_data import Pair, load_model, plan_for, write_lora
from tests.models.tiny_flux_parts import t5_original, tiny_t5, write_t5
from tests.unit.convert_data import read, run, wan, write_wan
from tests.unit.test_flux_checkpoint import ARCH, load, plan, scaled
from tests.unit.test_flux_checkpoint import run as forward

INDEX = "diffusion_pytorch_model.safetensors.index.json"
#: --linear_type -> what `mm_type: auto` finds, and the largest relative error of a forward of random weights
TYPES = {
    "int8": ("int8", 0.02),
    "fp8": ("fp8", 0.06),
    "fp8-b128": ("fp8-b128", 0.06),
    "fp8-pertensor": ("fp8-pertensor", 0.06),
    "mxfp8": ("mxfp8", 0.06),
    "mxfp6": ("mxfp6-mxfp8", 0.08),
    "mxfp4": ("mxfp4", 0.25),
    "nvfp4": ("nvfp4", 0.2),
    "int4-g128": ("int4-g128", 0.2),
}
DIT = ("-t", "flux_dit")
INT8 = ("--quantized", "--linear_type", "int8")


@pytest.fixture(scope="module")
def twin() -> FluxTransformer2DModel:
    return tiny.tiny_transformer()


@pytest.fixture(scope="module")
def state(twin: FluxTransformer2DModel) -> dict[str, Tensor]:
    return tiny.original_state(twin)


@pytest.fixture(scope="module")
def sources(twin: FluxTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sources")
    return {layout: tiny.write_dit(twin, base / layout, layout) for layout in tiny.LAYOUTS}


def equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Bit for bit."""

    def same(a: Tensor, b: Tensor) -> bool:
        both = a.dtype == b.dtype and a.shape == b.shape
        return both and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))

    return got.keys() == wanted.keys() and all(same(got[name], wanted[name]) for name in wanted)


def linears() -> set[str]:
    with torch.device("meta"):
        return set(linear_shapes(FLUX.build_dit(ARCH), FLUX))


@pytest.mark.parametrize("linear_type", TYPES)
def test_every_layout_has_the_same_codes(linear_type: str, sources: dict[str, Path], tmp_path: Path) -> None:
    flags = (*DIT, "--quantized", "--linear_type", linear_type, "--verify", "--save_by_block")
    for layout, source in sources.items():
        assert run(source, tmp_path / layout, *flags) == 0
    results = {layout: read(tmp_path / layout) for layout in sources}
    assert equal(results["diffusers"], results["original"]) and equal(results["comfyui"], results["original"])
    mm_type, most = TYPES[linear_type]
    planned = plan(tmp_path / "diffusers")
    assert {layer.name for layer in planned.layers if layer.mm_type == mm_type} == linears()
    error = tiny.relative_error(forward(load(tmp_path / "diffusers")), forward(tiny.tiny_dit()))
    assert most / 20 < error < most
    as_loaded = forward(load(sources["original"], mm_type, auto_quant=True))
    assert torch.equal(forward(load(tmp_path / "diffusers")), as_loaded)


def test_what_is_kept_and_where_it_goes(sources: dict[str, Path], state: dict[str, Tensor], tmp_path: Path) -> None:
    flags = (*DIT, *INT8, "--save_by_block", "--non_linear_dtype", "torch.bfloat16")
    assert run(sources["diffusers"], tmp_path / "out", *flags) == 0
    files = {f"block_{index}.safetensors" for index in range(5)} | {"non_block.safetensors", INDEX}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for name, file in weight_map.items():
        kind, _, index = ".".join(name.split(".")[:2]).partition(".")
        first = {"double_blocks": 0, "single_blocks": ARCH.num_layers}.get(kind)
        assert file == ("non_block" if first is None else f"block_{first + int(index)}") + ".safetensors"
    result = read(tmp_path / "out")
    assert result.keys() == state.keys() | {f"{layer}.weight_scale" for layer in linears()}
    for name, tensor in state.items():
        if name.removesuffix(".weight") not in linears():
            assert torch.equal(result[name], tensor.bfloat16()), name
    with safe_open(tmp_path / "out" / "block_2.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["model_type"], metadata["layout"]) == ("flux_dit", "original")
    layers = {f"single_blocks.0.{layer}" for layer in ("linear1", "linear2", "modulation.lin")}
    assert json.loads(metadata["quantization"])["layers"] == dict.fromkeys(layers, "W-int8-channel-sym")


@pytest.mark.parametrize("form", [("--single_file",), ("-c", "9"), ("-o_e", ".pth")], ids=lambda form: form[0])
def test_forms(form: tuple[str, ...], sources: dict[str, Path], tmp_path: Path) -> None:
    assert run(sources["diffusers"], tmp_path / "blocks", *DIT, *INT8, "--save_by_block") == 0
    assert run(sources["original"].parent, tmp_path / "out", *DIT, *INT8, *form) == 0
    whole = [path for path in (tmp_path / "out").iterdir() if path.stem == "converted"]
    opened = Checkpoint.open(whole[0] if whole else tmp_path / "out")
    assert equal({name: tensor.clone() for name, tensor in opened.stream()}, read(tmp_path / "blocks"))


def test_for_comfyui(sources: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--quantized", "--linear_type", "fp8", "--comfyui_mode", "--single_file")
    for layout in ("diffusers", "comfyui"):
        assert run(sources[layout], tmp_path / layout, *DIT, *flags) == 0
    results = {layout: read(tmp_path / layout) for layout in ("diffusers", "comfyui")}
    assert equal(results["diffusers"], results["comfyui"])
    assert results["diffusers"]["double_blocks.0.txt_attn.qkv.scale_weight"].shape == ()
    path = tmp_path / "comfyui" / "converted.safetensors"
    assert {layer.mm_type for layer in plan(path).layers} == {"fp8-pertensor"}
    assert tiny.relative_error(forward(load(path)), forward(tiny.tiny_dit())) < TYPES["fp8-pertensor"][1]


@pytest.mark.parametrize("slab", [50 * 128, 300 * 128])
def test_both_directions(
    slab: int, sources: dict[str, Path], twin: Any, state: dict[str, Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(SLAB_ELEMENTS, "cpu", slab)  # of rows that end within a part, or take in several
    for layout, source in sources.items():
        assert run(source, tmp_path / layout, *DIT, "-d", "backward", "-b", "--verify") == 0
        assert equal(read(tmp_path / layout), state)
        there = tmp_path / f"{layout}-forward"
        assert run(source, there, *DIT, "-d", "forward", "--verify") == 0
        loaded, report = FluxTransformer2DModel.from_pretrained(there, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert equal(dict(loaded.state_dict()), dict(twin.state_dict()))
        config, own = (json.loads((at / "config.json").read_text()) for at in (there, sources["diffusers"]))
        assert {key: config[key] for key in own if key[0] != "_"} == {key: own[key] for key in own if key[0] != "_"}


@pytest.mark.parametrize("kind", ["diffusers", "scaled", "scaled in parts"])
def test_rows_of_pieces_are_those_of_the_whole(
    kind: str, sources: dict[str, Path], twin: Any, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = sources.get(kind, tmp_path / "a.safetensors")
    if kind == "scaled":
        save_file(scaled(state, everything=True), path)
    elif kind == "scaled in parts":
        save_file(scaled(twin.state_dict(), everything=False), path)
    checkpoint = FLUX.open(path)
    assert isinstance(checkpoint, Assembled)
    reader = PieceReader(checkpoint)
    for name, whole in checkpoint.stream():
        assert equal({name: reader.rows(name)}, {name: whole.contiguous()}), name
        rows = whole.shape[0] if whole.dim() else 0
        for start, stop in ((0, 1), (rows - 1, rows), (100, 140), (rows // 2 - 3, rows // 2 + 3)):
            if 0 <= start < stop <= rows:
                assert torch.equal(reader.rows(name, start, stop).float(), whole[start:stop].float()), (name, start)


@pytest.mark.parametrize("direction", ["backward", "forward"])
@pytest.mark.parametrize("names", ["diffusers", "original", "kohya", "xlabs"])
def test_loras(names: str, direction: str, sources: dict[str, Path], twin: Any, state: Any, tmp_path: Path) -> None:
    """Added as it is when they are loaded with the model."""
    generator, renamed = torch.Generator().manual_seed(0), str
    model: nn.Module = twin if names == "diffusers" else tiny.tiny_dit()
    sizes = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if names == "diffusers":
        renamed = "transformer.{}".format
    if names == "kohya":
        renamed = lambda name: "lora_unet_" + name.replace(".", "_")  # noqa: E731
    if names == "xlabs":
        sizes = {f"single_blocks.{index}.processor.qkv_lora": (ARCH.dim, 3 * ARCH.dim) for index in range(3)}
        sizes |= {f"double_blocks.1.processor.proj_lora{index}": (ARCH.dim, ARCH.dim) for index in (1, 2)}
    pairs = {
        name: Pair(torch.randn(4, k, generator=generator) / k**0.5, torch.randn(n, 4, generator=generator) * 0.1, 3.0)
        for name, (k, n) in sizes.items()
    }
    if names == "xlabs":
        pairs = {name: Pair(pair.down, pair.up) for name, pair in pairs.items()}
    suffixes = (".down.weight", ".up.weight") if names == "xlabs" else (".lora_down.weight", ".lora_up.weight")
    made = write_lora(tmp_path / "a.safetensors", pairs, suffixes, renamed)
    flags = ("--lora_path", made.path, "--lora_strength", "0.7", "-d", direction)
    assert run(sources["original"], tmp_path / "out", *DIT, *flags) == 0
    at_load = plan_for(FLUX, ARCH, [type(made)(made.path, 0.7)], dynamic=False)
    wanted, _ = load_model(FLUX, ARCH, state, at_load, fuse=False)
    got = load(tmp_path / "out", "Default")
    assert tiny.relative_error(forward(got), forward(tiny.tiny_dit())) > 0.02
    assert tiny.relative_error(forward(got), forward(wanted)) < 2e-6
    merged = dict(FLUX.open(tmp_path / "out").stream())
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_lora_before_quantizing(sources: dict[str, Path], twin: Any, tmp_path: Path) -> None:
    layer = "single_transformer_blocks.0.attn.to_v"
    generator = torch.Generator().manual_seed(0)
    pair = Pair(torch.randn(4, 128, generator=generator), torch.randn(128, 4, generator=generator) * 0.1)
    made = write_lora(tmp_path / "a.safetensors", {layer: pair})
    for name, source in (("a", sources["diffusers"]), ("b", sources["original"])):
        assert run(source, tmp_path / name, *DIT, *INT8, "--lora_path", made.path, "--verify") == 0
    result = read(tmp_path / "a")
    assert equal(result, read(tmp_path / "b"))
    name = "single_blocks.0.linear1.weight"
    whole = result[name].float() * result[f"{name}_scale"]
    wanted = twin.get_parameter(f"{layer}.weight").detach() + pair.product
    assert tiny.relative_error(whole[256:384], wanted) < 0.01


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_pictures_with_all_of_it_converted(layout: tiny.Layout, kind: str, tmp_path: Path) -> None:
    """Into the places where the engine looks by itself."""
    model = write_model(tmp_path / "model", "dev", layout)
    root = tmp_path / "model"
    settings = {
        "model_cls": "flux",
        "task": "t2i",
        "model_path": str(model),
        "device": "cpu",
        "prompt": "a red circle",
        "seed": 1,
        "text_len": 16,
        "video.height": 48,
        "video.width": 32,
        "sampling.steps": 2,
    }
    plain = generate(settings)
    with pytest.raises(
        ConfigError, match=r"(?s)no converted file .*t5xxl_.*lightx2v convert --quantized --model_type flux_t5"
    ):
        resolve(load_config(None, {**settings, "t5.quantized": True, "t5.quant_scheme": kind}), select_device("cpu"))
    quantized = ("--quantized", "--linear_type", kind, "--verify")
    assert run(model, root / kind, *DIT, *quantized, "--save_by_block") == 0
    assert run(model, root / kind, "-t", "flux_t5", *quantized, "--single_file", "-o_n", f"t5xxl_{kind}") == 0
    settings |= {"mm_config.mm_type": kind, "t5.quantized": True, "t5.quant_scheme": "auto"}
    planned = resolve(load_config(None, settings), select_device("cpu"))
    assert {layer.mm_type for layer in planned.components["dit"].layers} == {kind}
    assert {layer.mm_type for layer in planned.components["t5"].layers} == {kind}
    got = generate(settings)
    assert psnr(got, plain) > 20 and not np.array_equal(got, plain)


def generate(settings: dict[str, Any]) -> np.ndarray:
    return LightX2VPipeline.from_config(load_config(None, settings)).generate(quiet=True)


@pytest.mark.parametrize("linear_type", ["int8", "fp8", "fp8-b128"])
def test_text_encoder(linear_type: str, tmp_path: Path) -> None:
    model = tiny_t5(scale=0.1)
    original, tokenizer = write_t5(model, tmp_path / "original", "original")
    folder, _ = write_t5(model, tmp_path / "diffusers", "diffusers")
    held = {f"{t5.PREFIX}{name}": tensor for name, tensor in t5_original(model).items()}
    held["model.diffusion_model.img_in.weight"] = torch.zeros(4, 4)
    save_file(held, tmp_path / "whole.safetensors")
    results = []
    for number, source in enumerate((original, folder, tmp_path / "whole.safetensors")):
        flags = ("-t", "flux_t5", "--quantized", "--linear_type", linear_type, "--single_file", "--verify")
        assert run(source, tmp_path / str(number), *flags) == 0
        results.append(load_file(tmp_path / str(number) / "converted.safetensors"))
    assert equal(results[0], results[1]) and equal(results[1], results[2])
    path = tmp_path / "0" / "converted.safetensors"
    shapes = t5.linear_shapes(t5.open_t5(path, quantized=True))
    codes = torch.int8 if linear_type == "int8" else torch.float8_e4m3fn
    assert {name for name, tensor in results[0].items() if tensor.dtype == codes} == {f"{n}.weight" for n in shapes}
    assert "encoder.embed_tokens.weight" not in results[0]  # it is shared.weight
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    exact = t5.load_t5(original, tokenizer, **options).encode(["a red circle"], 9)
    if linear_type == "fp8":  # which can be read as floats too
        got = t5.load_t5(path, tokenizer, **options).encode(["a red circle"], 9)
        assert 0 < tiny.relative_error(got, exact) < 0.2


def test_blocks_of_the_text_encoder(tmp_path: Path) -> None:
    folder, _ = write_t5(tiny_t5(), tmp_path / "model", "diffusers")
    assert run(folder, tmp_path / "out", "-t", "flux_t5", *INT8, "--save_by_block") == 0
    files = {"block_0.safetensors", "block_1.safetensors", "non_block.safetensors", INDEX}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        ("wan", (*DIT, *INT8), "is not a flux_dit\n  do: use --model_type wan_dit"),
        ("wan", DIT, "is not a flux_dit\n  do: use --model_type wan_dit"),
        ("wan-diffusers", DIT, "is not a flux_dit\n  do: use --model_type wan_dit"),
        ("original", ("-t", "wan_dit", *INT8), "is not a wan_dit\n  do: use --model_type flux_dit"),
        ("diffusers", ("-t", "wan_dit"), "is not a wan_dit\n  do: use --model_type flux_dit"),
        ("comfyui", ("-t", "flux_t5"), "is not a flux_t5\n  do: use --model_type flux_dit"),
        ("t5", DIT, "is not a flux_dit\n  do: use --model_type flux_t5"),
        ("t5", ("-t", "wan_t5"), "is not a wan_t5\n  do: use --model_type flux_t5"),
        ("t5", ("-t", "flux_t5", "--quantized", "--linear_type", "nvfp4"), "allowed: int8, fp8, fp8-b128"),
        ("scaled", (*DIT, *INT8), "it is quantized already"),
        ("scaled", (*DIT, "-d", "forward"), "' is quantized already"),
        ("part", DIT, "not a FLUX.1 DiT: tensor 'img_in.weight' is missing"),
        ("fill", DIT, "is FLUX.1 Fill"),
        ("original", (*DIT, *INT8, "-d", "forward"), "takes layers of flux_dit apart"),
        ("original", (*DIT, *INT8, "--ignore-quant-keys", "img_atn"), "did you mean 'img_attn'?"),
    ],
)
def test_mistakes(
    kind: str,
    flags: tuple[str, ...],
    says: str,
    sources: dict[str, Path],
    state: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = sources.get(kind, tmp_path / "a.safetensors")
    if kind.startswith("wan"):
        source = write_wan(tmp_path / "wan", wan(), "diffusers" if "-" in kind else "original")
    elif kind == "t5":
        source, _ = write_t5(tiny_t5(), tmp_path / "t5", "original")
    elif kind == "scaled":
        save_file(scaled(state, everything=False), source)
    elif kind == "part":
        save_file({name: tensor for name, tensor in state.items() if name != "img_in.weight"}, source)
    elif kind == "fill":
        save_file({**state, "img_in.weight": torch.zeros(128, 384)}, source)
    assert run(source, tmp_path / "out", *flags) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
