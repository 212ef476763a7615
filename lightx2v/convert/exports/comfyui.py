"""ComfyUI's file of fp8 weights with scales: `scale_weight`, `scale_input`, and a mark that it is one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightx2v.convert.exports.angelslim import one_scale
from lightx2v.convert.exports.base import Exported, Layer, Written
from lightx2v.convert.planning import COMFY_MARK
from lightx2v.io.derived import Made
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.quant.spec import FP8_TENSOR, FP8_TENSOR_DYNAMIC

_INPUTS = ("scale_input", "input_scale")


class ComfyUI:
    """The writer."""

    held = "fp8 weights with one scale each, and one scale of their inputs or none (fp8-pertensor)"

    def layer(self, layer: Layer) -> Exported:
        if layer.scheme.weight != FP8_TENSOR or layer.scheme.activation not in (None, FP8_TENSOR, FP8_TENSOR_DYNAMIC):
            raise layer.refuse()
        tensors = {
            f"{layer.name}.weight": layer.same("weight"),
            f"{layer.name}.scale_weight": one_scale(layer),
            **layer.bias(),
        }
        for leaf in _INPUTS:
            if leaf in layer.stored:
                tensors[f"{layer.name}.scale_input"] = layer.floats(leaf, ())
        return Exported("float8_e4m3fn", tensors)

    def beside(self) -> Mapping[str, Made]:
        dtype, shape = COMFY_MARK.dtype, COMFY_MARK.shape
        return {COMFY_MARK.name: Made((), lambda given: torch.zeros(shape).to(TORCH_DTYPES[dtype]), dtype, shape)}

    def file(self, name: str, is_dit: bool, kinds: Mapping[str, str]) -> str:
        return f"{name}.safetensors"

    def describe(self, written: Written) -> None:
        """Nothing: the file says it all."""


EXPORT = ComfyUI()
