"""From floats to codes and scales and back, with all scale arithmetic in float32 whatever the source dtype.

value = code * scale. M tokens, N output channels, K input channels; weights are [N, K], activations [M, K].
A row that is all zero has zero codes; a row with an inf or NaN has such a scale, so that the fault shows in the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.quant.spec import QSpec

FP8_MAX = 448.0
INT8_MAX = 127
#: LightX2V's converter never divides by less than this absolute maximum.
WEIGHT_MIN_AMAX = 1e-5

CODE_DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LEVELS = {"int8": float(INT8_MAX), "fp8": FP8_MAX}
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max


class Quantized(NamedTuple):
    """Codes (int8 or float8_e4m3fn) in the shape of the source, and their float32 scales."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Rounding:
    """How one library turns activations into codes: the same scheme is not the same arithmetic everywhere.

    `by` is what a value is multiplied or divided with: "scale" x / s, "reciprocal" x * (1 / s),
    "levels" x * (levels / amax). `in_bfloat16` does scale and division in bfloat16 when x is; `scale_in_float16`
    computes the scale of a float16 x in float16. `ties_away` rounds .5 away from zero. `levels` are steps from 0 to
    amax, when not those of the codes: codes beyond 127 are cut off.
    """

    by: Literal["scale", "reciprocal", "levels"]
    min_amax: float = 0.0
    min_scale: float = 0.0
    in_bfloat16: bool = False
    scale_in_float16: bool = False
    ties_away: bool = False
    levels: float | None = None


NATIVE = Rounding("levels")
#: AngelSlim's of whole tensors, weights and activations (angelslim/compressor/diffusion/quant/quant_func.py). It
#: divides in the dtype of the tensor, whatever that is; in float16 448 / amax overflows below amax = 0.0068, so that
#: one is float32 here.
ANGELSLIM = Rounding("levels", min_amax=1e-12, in_bfloat16=True)
_VLLM_FP8 = Rounding("scale", min_scale=1 / (FP8_MAX * 512))
_TORCHAO_FP8 = Rounding("scale", min_amax=1e-8, in_bfloat16=True)

#: (library, code dtype, granularity) -> its rounding, read from each library's source; others round as NATIVE.
_ROUNDINGS: dict[tuple[str, str, str], Rounding] = {
    ("vllm", "int8", "token"): Rounding("levels"),  # csrc/quantization/w8a8/int8/scaled_quant.cu
    ("vllm", "fp8", "token"): _VLLM_FP8,  # csrc/quantization/w8a8/fp8/common.cu
    ("sgl", "int8", "token"): Rounding("levels", min_amax=1e-10, ties_away=True),  # sglang int8_kernel.py
    ("sgl", "fp8", "token"): Rounding("reciprocal"),  # sgl-kernel per_token_quant_fp8.cu
    ("sgl", "fp8", "group"): Rounding("scale", min_amax=1e-10),  # sgl-kernel per_token_group_quant_8bit.cu
    # torchao's _quantize_activation_per_token_absmax: its eps is a lower bound of the scale
    ("torchao", "int8", "token"): Rounding("reciprocal", min_scale=1e-5, in_bfloat16=True, scale_in_float16=True),
    ("torchao", "fp8", "token"): _TORCHAO_FP8,
    # torchao's choose_qparams_affine and quantize_affine; compressed-tensors has the same range
    ("torchao_affine", "int8", "token"): Rounding("reciprocal", min_scale=torch.finfo(torch.float32).eps, levels=127.5),
    ("angelslim", "fp8", "tensor"): ANGELSLIM,
    ("deepgemm", "fp8", "group"): Rounding("levels", min_amax=1e-4),  # LightX2V's torch code for DeepGEMM
}


def rounding_of(library: str, spec: QSpec) -> Rounding:
    """The rounding that `library` applies to activations of `spec`."""
    return _ROUNDINGS.get((library, spec.dtype, spec.granularity), NATIVE)


def quantize_whole_bfloat16(x: Tensor, rounding: Rounding) -> Quantized:
    """fp8 codes of a bfloat16 tensor under one scale, with multiplier and products rounded to bfloat16: scale [1].

    The scale is the multiplier's reciprocal in float32. An inf gives codes NaN and scale inf.
    """
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    multiplier = amax.clamp(min=rounding.min_amax).reciprocal() * FP8_MAX  # which is what torch makes of 448 / amax
    codes = (x * multiplier).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return Quantized(codes, multiplier.float().reciprocal().reshape(1))


def quantize_weight(weight: Tensor, spec: QSpec, amax: Tensor | None = None) -> Quantized:
    """Quantize a weight [N, K] of any float dtype as LightX2V's converter does: amax >= 1e-5, scale = amax / levels.

    Channel: scale [N, 1]. Block: scale [ceil(N/size), ceil(K/size)]; the last block of a row or column may be partial.
    Tensor: scale [1]; `amax` is the largest absolute value of the whole when `weight` is a part of its rows.
    """
    levels = _levels(spec)
    values = weight.float()
    if spec.granularity == "channel":
        amax = values.abs().amax(dim=1, keepdim=True)
    elif spec.granularity == "block":
        amax = _blocks(values, spec.size).abs().amax(dim=(1, 3))
    elif spec.granularity == "tensor":
        amax = (values.abs().amax() if amax is None else amax).reshape(1)
    else:
        raise ValueError(f"weights have no granularity '{spec.granularity}'")
    scale = amax.clamp(min=WEIGHT_MIN_AMAX) / levels
    scaled = values / expand_scale(scale, spec, weight.shape)
    if spec.dtype == "int8":
        return Quantized(scaled.round_().clamp_(-INT8_MAX - 1, INT8_MAX).to(torch.int8), scale)
    return Quantized(scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


def dequantize_weight(codes: Tensor, scale: Tensor, spec: QSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] that codes [N, K] and their scale stand for."""
    return (codes.float() * expand_scale(scale.float(), spec, codes.shape)).to(dtype)


def quantize_activation(x: Tensor, spec: QSpec, rounding: Rounding = NATIVE) -> Quantized:
    """Quantize activations [M, K]. Token: scale [M, 1]. Group: scale [M, ceil(K/size)], the last maybe of a part."""
    levels = rounding.levels or _levels(spec)
    if spec.granularity == "token":
        groups = x.unsqueeze(1)
    elif spec.granularity == "group":
        groups = F.pad(x, (0, -x.shape[1] % spec.size)).unflatten(1, (-1, spec.size))
    else:
        raise ValueError(f"activations have no granularity '{spec.granularity}'")
    amax = groups.abs().amax(dim=2, keepdim=True)
    if not (rounding.in_bfloat16 and x.dtype == torch.bfloat16):
        groups = groups.float()
        amax = amax if rounding.scale_in_float16 and x.dtype == torch.float16 else amax.float()
    if rounding.min_amax:
        amax = amax.clamp(min=rounding.min_amax)
    # A GPU multiplies by the reciprocal of a number that divides a tensor, which rounds twice.
    scale = amax / torch.full_like(amax, levels)
    if rounding.min_scale:
        scale = scale.clamp(min=rounding.min_scale)
    if scale.dtype == torch.float16:
        scale = scale.float()
    # The clamps below keep zero rows, and rows so small that their scale is subnormal, finite.
    if rounding.by == "levels":
        # A number divided by a tensor would be the number times the tensor's reciprocal, which rounds twice.
        scaled = groups * (torch.full_like(amax, levels) / amax).clamp(max=_HUGE)
    elif rounding.by == "reciprocal":
        scaled = groups * scale.reciprocal().clamp(max=torch.finfo(scale.dtype).max)
    else:
        scaled = groups / scale.clamp(min=_TINY)
    if spec.dtype == "int8":
        # |x| <= amax, so a code can reach 127 but not pass it, save with a scale that was rounded to bfloat16.
        scaled = _round_away(scaled) if rounding.ties_away else scaled.round_()
        if rounding.in_bfloat16:
            scaled = scaled.clamp_(-INT8_MAX, INT8_MAX)
        if rounding.levels:
            scaled = scaled.clamp_(-INT8_MAX - 1, INT8_MAX)
    codes = scaled.to(CODE_DTYPES[spec.dtype]).flatten(1)
    return Quantized(codes[:, : x.shape[1]].contiguous(), scale.float().squeeze(2))


def _levels(spec: QSpec) -> float:
    if spec.dtype not in _LEVELS or not spec.symmetric:
        raise ValueError(f"no numerics for {spec}; there are symmetric {' and '.join(_LEVELS)}")
    return _LEVELS[spec.dtype]


def _blocks(values: Tensor, size: int) -> Tensor:
    """[N, K] -> [ceil(N/size), size, ceil(K/size), size], zero-padded."""
    rows, columns = values.shape
    padded = F.pad(values, (0, -columns % size, 0, -rows % size))
    return padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)


def expand_scale(scale: Tensor, spec: QSpec, shape: torch.Size) -> Tensor:
    """Scales in a shape that broadcasts against the [N, K] weight."""
    if spec.granularity != "block":
        return scale
    per_row = scale.repeat_interleave(spec.size, dim=0)[: shape[0]]
    return per_row.repeat_interleave(spec.size, dim=1)[:, : shape[1]]


def _round_away(values: Tensor) -> Tensor:
    whole = values.trunc()
    return whole + torch.where((values - whole).abs() >= 0.5, values.sign(), 0)
