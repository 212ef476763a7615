"""The scheme names of quantized text and image encoders, with stand-ins for the vendors' libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightx2v.config.load import load_config
from lightx2v.config.schema import EncoderConfig
from lightx2v.encoders import clip_vision
from lightx2v.errors import ConfigError
from lightx2v.families.wan import WAN
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.plan.encoders import _quantized_encoder, plan_encoder
from lightx2v.platform import DeviceInfo
from tests.contracts import vendors
from tests.models import test_encoder_quantization as encoders
from tests.models import tiny_encoders as tiny

#: A device of compute capability 9.0 whose tensors are in RAM, so that the stand-ins can compute.
HOPPER = DeviceInfo("cpu", 0, "a Hopper GPU", (9, 0), 1, 1)
CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
PARTS = {part.name: part for part in WAN.parts}
#: Scheme name of an encoder -> the library that computes it; None leaves that to the engine.
SCHEMES = {
    "int8": None,
    "fp8": None,
    "int8-vllm": "vllm",
    "fp8-vllm": "vllm",
    "int8-torchao": "torchao",
    "int8-q8f": "q8f",
    "fp8-q8f": "q8f",
    "fp8-sgl": "sgl",
    "int8-sgl": "sgl",
}
#: [N, K] of the quantized layers of UMT5-XXL and of CLIP ViT-H: q, k, v and o; gate and fc1; fc2; to_qkv; mlp.
SHAPES = [(4096, 4096), (10240, 4096), (4096, 10240), (3840, 1280), (1280, 1280), (5120, 1280), (1280, 5120)]
ENCODERS = ("t5", "clip")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    vendors.install(monkeypatch, vendors.FAKES)
    yield
    vendors.forget()


def plans(shapes: dict[str, tuple[int, int]], mm_type: str, device: DeviceInfo = HOPPER) -> dict[str, LayerPlan]:
    scheme = parse(mm_type)
    return {
        name: plan_layer(name, mm_type, scheme, n, k, device=device, fallback=False) for name, (n, k) in shapes.items()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_of_the_real_encoders_is_served(scheme: str) -> None:
    chosen = plans({str(shape): shape for shape in SHAPES}, scheme)
    wanted = {SCHEMES[scheme]} if SCHEMES[scheme] else {"onednn", "vllm"}
    assert {plan.library for plan in chosen.values()} <= wanted
    assert all(plan.scheme.numerics == parse(scheme).numerics for plan in chosen.values())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_configuration_takes_it_under_both_names(name: str, scheme: str) -> None:
    for given in (
        {name: {"quantized": True, "quant_scheme": scheme, "quantized_ckpt": "file.pth"}},
        {f"{name}_quantized": True, f"{name}_quant_scheme": scheme, f"{name}_quantized_ckpt": "file.pth"},
    ):
        encoder = getattr(load_config(None, given), name)
        assert _quantized_encoder(PARTS[name], encoder, None, Path("original")) == (Path("file.pth"), scheme)


@pytest.mark.parametrize("scheme", [*SCHEMES, "auto", "W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm"])
@pytest.mark.parametrize("name", ENCODERS)
def test_without_a_path_the_usual_places_are_looked_at(name: str, scheme: str, tmp_path: Path) -> None:
    encoder, files = EncoderConfig(quantized=True, quant_scheme=scheme), SimpleNamespace(root=tmp_path)
    kind = "fp8" if "fp8" in scheme else "int8"
    stem = {"t5": "models_t5_umt5-xxl-enc", "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14"}[name]
    place = tmp_path / f"{stem}-{kind}.pth"
    with pytest.raises(ConfigError, match="no converted file lies in its usual places") as caught:
        _quantized_encoder(PARTS[name], encoder, files, tmp_path)
    assert str(place) in str(caught.value)
    place.touch()
    assert _quantized_encoder(PARTS[name], encoder, files, tmp_path) == (place, scheme)


def test_auto_does_not_guess_between_two_files(tmp_path: Path) -> None:
    encoder, files = EncoderConfig(quantized=True, quant_scheme="auto"), SimpleNamespace(root=tmp_path)
    for kind in ("int8", "fp8"):
        (tmp_path / f"models_t5_umt5-xxl-enc-{kind}.pth").touch()
    with pytest.raises(ConfigError, match="several files could be meant") as caught:
        _quantized_encoder(PARTS["t5"], encoder, files, tmp_path)
    assert caught.value.do == "set it, or name the scheme as t5.quant_scheme"


def test_an_unknown_name_is_told_with_the_nearest_known_one(tmp_path: Path) -> None:
    encoder = EncoderConfig(quantized=True, quant_scheme="int8-vlm")
    with pytest.raises(ConfigError, match="did you mean 'int8-vllm'"):
        _quantized_encoder(PARTS["t5"], encoder, SimpleNamespace(root=tmp_path), tmp_path)


@pytest.mark.parametrize("stored", ["int8", "fp8", "fp8-b128"])
@pytest.mark.parametrize("name", ENCODERS)
def test_auto_reads_what_the_checkpoint_holds(name: str, stored: str, tmp_path: Path) -> None:
    files, _, linear_shapes = encoders.write(name, tmp_path)
    encoders.quantize_file(files[0], linear_shapes(Checkpoint.open(files[0])), f"{stored}-reference")
    settings = {"quantized": True, "quant_scheme": "auto", "quantized_ckpt": str(files[0])}
    config = load_config(None, {"model_cls": "wan2.1", name: settings})
    planned = plan_encoder(PARTS[name], config, SimpleNamespace(require=lambda part: files[0]), CPU)
    assert planned.layers and {plan.scheme.numerics for plan in planned.layers} == {parse(stored).numerics}


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme.endswith("q8f")])
def test_the_image_encoder_runs_on_each(scheme: str, tmp_path: Path) -> None:
    """The reference rounds activations as the named library does. Its 64 channels do not fill a tile of q8_kernels."""
    files = tiny.write_clip(tiny.tiny_clip(width=128), tmp_path, "original")
    shapes = clip_vision.linear_shapes(Checkpoint.open(files[0]))
    encoders.quantize_file(files[0], shapes, f"{parse(scheme).weight.dtype}-reference")  # type: ignore[union-attr]
    chosen = plans(shapes, scheme)
    vendors.CALLS.clear()
    _, got = encoders.encode_picture(files, quant_plans=chosen)
    assert (len(vendors.CALLS) >= len(shapes)) == (SCHEMES[scheme] is not None)
    exact = {
        name: plan_layer(name, scheme, plan.scheme.with_library("reference"), *shapes[name], device=CPU, fallback=False)
        for name, plan in chosen.items()
    }
    _, wanted = encoders.encode_picture(files, quant_plans=exact)
    assert torch.isfinite(got).all()
    assert (got - wanted).norm() <= 0.05 * wanted.norm()  # products are rounded to bfloat16 on the way
