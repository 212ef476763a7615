"""The real angelslim, where it is installed, on files that we write and weights that we quantize."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn

from lightx2v.integrations.diffusers import DynamicDiTQuantizer
from tests.data.interop import tiny
from tests.data.interop.make_angelslim import package

pytestmark = pytest.mark.skipif(importlib.util.find_spec("angelslim") is None, reason="angelslim is not installed")
MODELS: dict[str, Any] = {"wan": WanTransformer3DModel, "flux": FluxTransformer2DModel}


@pytest.fixture(scope="module")
def theirs() -> Any:
    return package().DynamicDiTQuantizer


def fp8_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("FP8DynamicLinear", "FP8WeightOnlyLinear")}


@pytest.mark.parametrize("kind", ["fp8-per-tensor", "fp8-per-tensor-weight-only"])
@pytest.mark.parametrize("name", MODELS)
def test_it_loads_what_we_export(name: str, kind: str, theirs: Any, tmp_path: Path) -> None:
    DynamicDiTQuantizer("fp8-per-tensor").export_quantized_weight(getattr(tiny, name)().bfloat16(), tmp_path)
    model = MODELS[name].from_pretrained(tmp_path)
    theirs(kind, native_fp8_support=False).convert_linear(model, scale=str(tmp_path))
    written, layers = load_file(tmp_path / "diffusion_pytorch_model.safetensors"), fp8_layers(model)
    assert {f"{layer}.weight_scale" for layer in layers} == set(load_file(tmp_path / "fp8_scales.safetensors"))
    for layer, module in layers.items():
        assert torch.equal(module.weight.view(torch.uint8), written[f"{layer}.weight"].view(torch.uint8))
        assert torch.equal(module.weight_scale, written[f"{layer}.weight_scale"])
        if module.bias is not None:
            assert torch.equal(module.bias, written[f"{layer}.bias"])


@pytest.mark.parametrize("name", MODELS)
def test_both_exports_of_a_model_are_the_same(name: str, theirs: Any, tmp_path: Path) -> None:
    model = getattr(tiny, name)().bfloat16()
    DynamicDiTQuantizer().export_quantized_weight(copy.deepcopy(model), tmp_path / "ours")
    theirs("fp8-per-tensor", native_fp8_support=False).export_quantized_weight(model, str(tmp_path / "theirs"))
    for file in ("diffusion_pytorch_model.safetensors", "fp8_scales.safetensors"):
        ours, other = load_file(tmp_path / "ours" / file), load_file(tmp_path / "theirs" / file)
        assert ours.keys() == other.keys()
        for key in ours:
            assert ours[key].dtype == other[key].dtype and ours[key].shape == other[key].shape
            assert torch.equal(ours[key].reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("kind", ["fp8-per-tensor", "fp8-per-tensor-weight-only"])
@torch.no_grad()
def test_a_layer_gives_the_same_bits_on_a_cpu(kind: str, theirs: Any) -> None:
    torch.manual_seed(0)
    ours = nn.ModuleDict({"block": nn.Linear(200, 136)}).bfloat16()
    other = copy.deepcopy(ours)
    DynamicDiTQuantizer(kind).convert_linear(ours)
    theirs(kind, native_fp8_support=False).convert_linear(other)
    for size in (1e-4, 1.0, 300.0):
        x = (torch.randn(2, 17, 200) * size).bfloat16()
        assert torch.equal(ours["block"](x), other["block"](x))


@pytest.mark.parametrize("kind", ["fp8-per-token", "fp8-per-block"])
@torch.no_grad()
def test_codes_and_scales_of_its_other_types_are_ours(kind: str, theirs: Any) -> None:
    torch.manual_seed(0)
    ours = nn.ModuleDict({"block": nn.Linear(200, 136)}).bfloat16()
    other = copy.deepcopy(ours)
    DynamicDiTQuantizer(kind).convert_linear(ours)
    theirs(kind, native_fp8_support=False).convert_linear(other)
    state, module = ours.state_dict(), other["block"]
    assert torch.equal(state["block.weight"].view(torch.uint8), module.weight.view(torch.uint8))
    scale = module.weight_scale
    assert torch.equal(state["block.weight_scale"], scale.t() if kind == "fp8-per-token" else scale)
