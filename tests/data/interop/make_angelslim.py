"""AngelSlim's per-tensor export, and what its own layers give, with its arithmetic for devices without fp8 products.

Of each model the example is in float32: AngelSlim's own functions on float32 inputs, which its layers would round to
bfloat16 before they call them. `<model>-bfloat16` is what the layers give as they are, in a model of bfloat16.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.data.interop.tiny import flux, fresh, wan, write_example

MODELS = {"wan": wan, "flux": flux}


def package() -> types.ModuleType:
    """angelslim.compressor.diffusion.quant: the packages above it import what only language models need."""
    found = importlib.util.find_spec("angelslim")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("angelslim is not installed (pip install --no-deps angelslim)")
    folder = Path(found.submodule_search_locations[0])
    for name, path in (("angelslim", folder), ("angelslim.compressor", folder / "compressor")):
        parent = types.ModuleType(name)
        parent.__path__ = [str(path)]
        sys.modules[name] = parent
    return importlib.import_module("angelslim.compressor.diffusion.quant")


def weight_of(layer: Any) -> Tensor:
    return layer.weight.float() * getattr(layer, "weight_scale", 1.0)


class Float32Layer(nn.Module):
    """A layer of AngelSlim's on the inputs that it is given, float32 ones as they are."""

    def __init__(self, functions: Any, layer: Any) -> None:
        super().__init__()
        self.functions = functions
        self.weight, self.weight_scale = layer.weight, layer.weight_scale
        self.bias = None if layer.bias is None else layer.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.functions.fp8_per_tensor_quant(x)
        product: Tensor = self.functions.fp8_gemm(codes, scale, self.weight, self.weight_scale, self.bias, x.dtype)
        return product


@torch.no_grad()
def in_float32(converted: nn.Module, model: nn.Module) -> nn.Module:
    """`model`, of float32, with the layers and the numbers of the model that AngelSlim converted."""
    functions = importlib.import_module("angelslim.compressor.diffusion.quant.quant_func")
    for name, layer in converted.named_modules():
        if type(layer).__name__ == "FP8DynamicLinear":
            model.set_submodule(name, Float32Layer(functions, layer))
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32:
            parameter.copy_(converted.get_parameter(name).float())
    return model


def write_sources(path: Path, model: nn.Module) -> None:
    """The weights that AngelSlim quantizes here, for another quantizer to make the same codes of."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    save_file({f"{name}.weight": layer.weight.detach().bfloat16() for name, layer in linears.items()}, path)


if __name__ == "__main__":
    angelslim = package()
    for name, build in MODELS.items():
        folder = fresh("angelslim", name)
        model = build(width=32)
        if name == "wan":
            write_sources(folder.with_name("wan.sources.safetensors"), model.blocks)
        angelslim.DynamicDiTQuantizer("fp8-per-tensor", native_fp8_support=False).export_quantized_weight(
            model, str(folder)
        )
        write_example(folder, in_float32(model, build(width=32)), weight_of, ("angelslim",))
        write_example(folder.with_name(f"{name}-bfloat16"), model, weight_of, ("angelslim",), torch.bfloat16)
        # The same file under the other type of which AngelSlim's export can be read.
        model = build(width=32)
        angelslim.DynamicDiTQuantizer("fp8-per-tensor-weight-only", native_fp8_support=False).convert_linear(model)
        write_example(folder.with_name(f"{name}-weight-only"), model, weight_of, ("angelslim",), torch.bfloat16)
