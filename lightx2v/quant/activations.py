"""Activations of any scheme as codes and scales: what a library's `quantize` does in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.quant.blocks import E4M3, by_rows, fill_up, global_scale, mx_blocks, nvfp4_blocks
from lightx2v.quant.numerics import (
    FP8_MAX,
    NATIVE,
    Quantized,
    Rounding,
    quantize_activation,
    quantize_whole_bfloat16,
)
from lightx2v.quant.spec import QSpec

_TINY = torch.finfo(torch.float32).tiny
INT4_LEVELS = 7
BLOCK_SCALED = ("mxfp8", "mxfp6", "mxfp4", "nvfp4")


def quantize_whole(x: Tensor, static: Tensor | None, rounding: Rounding = NATIVE) -> Quantized:
    """fp8 codes of activations [M, K] under one scale [1]: `static`, or amax / 448 of this very tensor.

    All of it is float32, save a scale of bfloat16 x that `rounding` has in bfloat16. What is larger than 448 times a
    static scale becomes the largest code; an inf becomes NaN.
    """
    if static is None and rounding.in_bfloat16 and x.dtype == torch.bfloat16:
        return quantize_whole_bfloat16(x, rounding)
    if static is None:
        amax = x.abs().amax().float()
        scale = amax / torch.full_like(amax, FP8_MAX)
    else:
        scale = static.reshape(())
    divisor = scale.clamp(min=_TINY)

    def make(slab: Tensor) -> tuple[Tensor]:
        scaled = slab.float() / divisor
        within = scaled.clamp(-FP8_MAX, FP8_MAX)
        codes = torch.where(scaled.isinf(), torch.nan, within).to(E4M3)
        return (codes.view(torch.uint8),)

    return Quantized(by_rows(x, make)[0].view(E4M3), scale.reshape(1))


def quantize_int4(x: Tensor, spec: QSpec) -> Quantized:
    """e4m3 numbers -7 to 7 and scales amax / 7 of groups of activations [M, K] (SVDQuant, arXiv 2411.05007)."""

    def make(slab: Tensor) -> tuple[Tensor, Tensor]:
        groups = fill_up(slab.float(), spec).unflatten(1, (-1, spec.size))
        amax = groups.abs().amax(dim=2, keepdim=True)
        scale = amax / torch.full_like(amax, INT4_LEVELS)
        codes = (groups / scale.clamp(min=_TINY)).round_()
        return codes.flatten(1).to(E4M3).view(torch.uint8), scale.squeeze(2)

    codes, scale = by_rows(x, make)
    return Quantized(codes.view(E4M3), scale)


def quantize_input(x: Tensor, spec: QSpec, rounding: Rounding = NATIVE, static: Tensor | None = None) -> Quantized:
    """Codes [M, K] and float32 scales of activations [M, K], K filled up with zeros to whole groups.

    `static` is what the checkpoint has for the layer's input: `input_scale` (fp8, a factor), `input_global_scale`
    (nvfp4, a divisor); None takes the scale of this tensor. Elements of four and six bits come as the e4m3 numbers that
    they are. The scales of nvfp4 are [M, G + 1]: those of the groups, and in the last column the one of the tensor, a
    factor.
    """
    if spec.dtype == "nvfp4":
        tensor_scale = global_scale(x.abs().amax()) if static is None else static
        blocks = nvfp4_blocks(x, spec, tensor_scale)
        factor = tensor_scale.reciprocal().expand(x.shape[0], 1)
        return Quantized(blocks.elements, torch.cat((blocks.scale.float(), factor), dim=1))
    if spec.dtype in BLOCK_SCALED:
        blocks = mx_blocks(x, spec)
        return Quantized(blocks.elements, blocks.scale.float())
    if spec.dtype == "int4":
        return quantize_int4(x, spec)
    if spec.granularity == "tensor":
        return quantize_whole(x, None if spec.dynamic else static, rounding)
    return quantize_activation(fill_up(x, spec) if spec.size else x, spec, rounding)
