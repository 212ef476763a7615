"""AngelSlim's per-tensor export, and what its own layers give, with its arithmetic for devices without fp8 products."""

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
    return layer.weight.float() * layer.weight_scale


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
        write_example(folder, model, weight_of, ("angelslim",), torch.bfloat16)
        # The same file under the other type of which AngelSlim's export can be read.
        model = build(width=32)
        angelslim.DynamicDiTQuantizer("fp8-per-tensor-weight-only", native_fp8_support=False).convert_linear(model)
        write_example(folder.with_name(f"{name}-weight-only"), model, weight_of, ("angelslim",), torch.bfloat16)
