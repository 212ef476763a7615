"""ComfyUI's files of quantized weights, as `quant.formats` reads them.

    fp8     weight e4m3 [N, K], scale_weight and perhaps scale_input float32 []; `scaled_fp8` marks the file
    mxfp8   weight e4m3 [N, K]; weight_scale e8m0 as bytes, in the order of block-scaled tensor cores
    nvfp4   weight uint8 [N, K / 2], the first code in the high half; weight_scale e4m3 in the same order;
            weight_scale_2 and perhaps input_scale float32 []: factors of the tensors

`comfy_quant`, JSON as bytes, names the format of a layer of the latter two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightx2v.convert.exports.angelslim import one_scale
from lightx2v.convert.exports.base import Exported, Layer, Written
from lightx2v.convert.planning import COMFY_MARK
from lightx2v.io.comfy import LEAF
from lightx2v.io.derived import Made
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.quant.around import AROUND_LEAVES
from lightx2v.quant.formats import read_leaves
from lightx2v.quant.packing import swap_halves, swizzle, swizzled_shape
from lightx2v.quant.spec import (
    FP8_TENSOR,
    FP8_TENSOR_DYNAMIC,
    MXFP8,
    MXFP8_DYNAMIC,
    NVFP4,
    NVFP4_DYNAMIC,
)

_INPUTS = ("scale_input", "input_scale")
_FP8, _MXFP8, _NVFP4 = "float8_e4m3fn", "mxfp8", "nvfp4"
_INPUTS_NVFP4 = ("input_absmax", "input_global_scale", "input_scale")


class ComfyUI:
    """The writer."""

    held = (
        "fp8 weights with one scale each, and one scale of their inputs or none (fp8-pertensor), mxfp8, and nvfp4 with "
        "or without a scale of its input"
    )

    def layer(self, layer: Layer) -> Exported:
        weight, activation = layer.scheme.numerics
        if weight == FP8_TENSOR and activation in (None, FP8_TENSOR, FP8_TENSOR_DYNAMIC):
            return Exported(_FP8, _whole(layer))
        if weight == MXFP8 and activation in (None, MXFP8_DYNAMIC):
            return Exported(_MXFP8, _mxfp8(layer))
        if weight == NVFP4 and activation in (None, NVFP4_DYNAMIC):
            return Exported(_NVFP4, _nvfp4(layer))
        raise layer.refuse()

    def beside(self, kinds: Mapping[str, str]) -> Mapping[str, Made]:
        if _FP8 not in kinds.values():
            return {}
        dtype, shape = COMFY_MARK.dtype, COMFY_MARK.shape
        return {COMFY_MARK.name: Made((), lambda given: torch.zeros(shape).to(TORCH_DTYPES[dtype]), dtype, shape)}

    def file(self, name: str, is_dit: bool, kinds: Mapping[str, str]) -> str:
        return f"{name}.safetensors"

    def describe(self, written: Written) -> None:
        """Nothing: the file says it all."""


EXPORT = ComfyUI()
Tensors = dict[str, Made | str]


def _whole(layer: Layer) -> Tensors:
    tensors: Tensors = {
        f"{layer.name}.weight": layer.same("weight"),
        f"{layer.name}.scale_weight": one_scale(layer),
        **layer.bias(),
    }
    for leaf in _INPUTS:
        if leaf in layer.stored:
            tensors[f"{layer.name}.scale_input"] = layer.floats(leaf, ())
    return tensors


def _mxfp8(layer: Layer) -> Tensors:
    return _blocks(layer, _MXFP8, "F8_E4M3", "U8", lambda codes: codes.view(torch.uint8)[:, -1])


def _nvfp4(layer: Layer) -> Tensors:
    def factor(leaf: str) -> Made:
        return _made(layer, lambda leaves: leaves[leaf].float().reciprocal().reshape(()), "F32", ())

    tensors = _blocks(layer, _NVFP4, "U8", "F8_E4M3", lambda codes: codes[:, -1] >> 4)
    tensors[f"{layer.name}.weight_scale_2"] = factor("weight_global_scale")
    if any(leaf in layer.stored for leaf in _INPUTS_NVFP4):
        tensors[f"{layer.name}.input_scale"] = factor("input_global_scale")
    return tensors


def _blocks(layer: Layer, kind: str, codes: str, scales: str, last: Callable[[Tensor], Tensor]) -> Tensors:
    """Codes, scales and mark of a format of blocks, of `codes` and `scales` as dtypes."""
    mark = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    of_groups = swizzled_shape(*layer.spec.scale_shape(layer.n, layer.k))

    def weight(leaves: Mapping[str, Tensor]) -> Tensor:
        layer.check_whole(last(leaves["weight"]))
        return leaves["weight"] if kind == _MXFP8 else swap_halves(leaves["weight"])

    def weight_scale(leaves: Mapping[str, Tensor]) -> Tensor:
        return swizzle(leaves["weight_scale"]).view(TORCH_DTYPES[scales])

    return {
        f"{layer.name}.weight": _made(layer, weight, codes, layer.stored["weight"].shape),
        f"{layer.name}.weight_scale": _made(layer, weight_scale, scales, of_groups),
        f"{layer.name}.{LEAF}": Made((), lambda given: mark, "U8", tuple(mark.shape)),
        **layer.bias(),
    }


def _made(layer: Layer, make: Callable[[Mapping[str, Tensor]], Tensor], dtype: str, shape: tuple[int, ...]) -> Made:
    """A tensor that is made of what libraries compute with, however the source holds it."""
    stored = [leaf for leaf in layer.stored if leaf not in ("bias", *AROUND_LEAVES)]

    def of(given: Mapping[str, Tensor]) -> Tensor:
        return make(read_leaves(given, layer.spec, layer.n, layer.k, f"{layer.where}: layer '{layer.name}'"))

    return layer.made(of, dtype, shape, *stored)
