"""Files that angelslim wrote, beside what its own layers gave; `tests/data/interop/make_angelslim.py` made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lightx2v.integrations.diffusers import DynamicDiTQuantizer, load_quantized_model
from lightx2v.integrations.linear import MovableLinear

DATA = Path(__file__).parents[1] / "data" / "interop" / "angelslim"
CLASSES: dict[str, Any] = {"wan": WanTransformer3DModel, "flux": FluxTransformer2DModel}
TYPES = {"-bfloat16": "fp8-per-tensor", "-weight-only": "fp8-per-tensor-weight-only"}


@torch.no_grad()
def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The model's output for stored inputs, in bfloat16, as AngelSlim's models compute."""
    latents, text = given["latents"].bfloat16(), given["text"].bfloat16()
    if isinstance(model, WanTransformer3DModel):
        out: Tensor = model(latents, given["timestep"], F.pad(text, (0, 0, 0, 512 - text.shape[1]))).sample
        return out
    packed = FluxPipeline._pack_latents(latents[:, :, 0], 1, 4, *latents.shape[3:])
    out = model(
        hidden_states=packed,
        encoder_hidden_states=text,
        pooled_projections=given["pooled"].bfloat16(),
        timestep=given["timestep"] / 1000,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 3, 4, latents.device, torch.float32),
        txt_ids=torch.zeros(text.shape[1], 3),
        guidance=torch.tensor([3.5]),
    ).sample
    return FluxPipeline._unpack_latents(out, 48, 64, 8)[:, :, None]


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("suffix", TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_its_export_gives_what_it_gives_there(name: str, suffix: str) -> None:
    example = load_file(DATA / f"{name}{suffix}.example.safetensors")
    model = load_quantized_model(CLASSES[name], DATA / name, quant_type=TYPES[suffix])
    # AngelSlim casts diffusers' tables of positions too; codes and scales stay.
    model.to(torch.bfloat16)
    assert off(run(model, example), example["output"]) <= 1e-3
    layers = {key: model.get_submodule(key.removesuffix(".weight")) for key in example if key.endswith(".weight")}
    assert sum(isinstance(layer, MovableLinear) for layer in layers.values()) == 2
    for key, layer in layers.items():
        state = layer.state_dict()
        values = state["weight"].float() * state.get("weight_scale", 1.0)
        assert torch.equal(values[: example[key].shape[0]], example[key])


@pytest.mark.parametrize("name", CLASSES)
def test_its_own_way_back_works_here(name: str) -> None:
    """from_pretrained reads the codes as numbers, convert_linear the scales."""
    example = load_file(DATA / f"{name}-bfloat16.example.safetensors")
    model = CLASSES[name].from_pretrained(DATA / name).eval()
    DynamicDiTQuantizer("fp8-per-tensor").convert_linear(model, scale=str(DATA / name))
    assert off(run(model.to(torch.bfloat16), example), example["output"]) <= 1e-3


def test_tables_of_positions_in_float32_are_what_diffusers_wants() -> None:
    example = load_file(DATA / "wan-bfloat16.example.safetensors")
    model = load_quantized_model(WanTransformer3DModel, DATA / "wan")
    assert 0 < off(run(model, example), example["output"]) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_weights_become_the_same_codes_and_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = load_file(DATA / "wan" / "diffusion_pytorch_model.safetensors")
    sources = load_file(DATA / "wan.sources.safetensors")
    model = nn.ModuleDict({"blocks": nn.Module()})
    layers = {key.removesuffix(".weight"): weight for key, weight in sources.items()}
    for name, weight in layers.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        model["blocks"].add_module(name.replace(".", "/"), linear)
    quantizer = DynamicDiTQuantizer("fp8-per-tensor")
    quantizer.export_quantized_weight(model, tmp_path)
    ours, scales = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "fp8_scales.safetensors")
    assert len(layers) == 10
    for name in layers:
        here, there = f"blocks.{name.replace('.', '/')}", f"blocks.{name}"
        for leaf in ("weight", "weight_scale"):
            got, wanted = ours[f"{here}.{leaf}"], theirs[f"{there}.{leaf}"]
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            assert torch.equal(got.view(torch.uint8) if leaf == "weight" else got, _bytes(wanted, leaf))
        assert torch.equal(scales[f"{here}.weight_scale"], theirs[f"{there}.weight_scale"])


def _bytes(tensor: Tensor, leaf: str) -> Tensor:
    return tensor.view(torch.uint8) if leaf == "weight" else tensor
