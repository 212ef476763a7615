"""Weights as integers of 2, 3, 4 or 8 bits with a scale, and perhaps a zero point, for each group or channel of a row.

Symmetric: value = code * scale, codes from -2^(b-1); stored as code + 2^(b-1), but for int8, which has a sign.
Affine: value = (code - zero) * scale, codes from 0 to 2^b - 1, any float for `zero` (Quanto's shift is zero * scale;
HQQ, https://mobiusml.github.io/hqq_blog). Everything is computed in float32. N rows, K columns, G groups of a row; K is
filled up with zeros to whole groups and whole bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.quant.numerics import WEIGHT_MIN_AMAX
from lightx2v.quant.packing import pack4
from lightx2v.quant.spec import QSpec


def levels_of(spec: QSpec) -> int:
    """2^b: the number of codes."""
    assert spec.bits is not None
    return 1 << int(spec.bits)


def group_count(spec: QSpec, k: int) -> int:
    """G: how many scales a row of k columns has."""
    return spec.scale_shape(1, k)[1]


def integer_leaves(weight: Tensor, spec: QSpec) -> dict[str, Tensor]:
    """The tensors of a float weight [N, K], codes rounded to nearest.

    Symmetric: scale = amax / (2^(b-1) - 1), amax at least 1e-5. Affine: scale = (max - min) / (2^b - 1), zero =
    -min / scale, as Quanto's MaxOptimizer.
    """
    low, high = _groups(weight, spec).aminmax(dim=2)
    return encode_integers(weight, spec, *integer_scales(low, high, levels_of(spec), spec.symmetric))


def integer_scales(low: Tensor, high: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points, float32, with which the first and the last of `levels` codes reach from low to high."""
    if symmetric:
        largest = torch.maximum(high, -low).clamp_(min=WEIGHT_MIN_AMAX)
        return largest / torch.full_like(largest, levels // 2 - 1), None
    scale = ((high - low) / torch.full_like(high, levels - 1)).clamp_(min=WEIGHT_MIN_AMAX / (levels - 1))
    return scale, -low / scale


def encode_integers(weight: Tensor, spec: QSpec, scale: Tensor, zero: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a weight [N, K] under given scales and zero points, float32 [N, G]."""
    top = levels_of(spec) - 1
    codes = _groups(weight, spec) / scale.unsqueeze(2)
    codes = codes + (top // 2 + 1 if zero is None else zero.unsqueeze(2))
    codes = codes.round_().clamp_(0, top).to(torch.uint8).flatten(1)
    leaves = {"weight": pack_integers(codes, spec), "weight_scale": scale}
    return leaves if zero is None else {**leaves, "weight_zero": zero}


def integer_values(leaves: Mapping[str, Tensor], spec: QSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] of such tensors, K filled up as it is stored."""
    scale, zero = leaves["weight_scale"], leaves.get("weight_zero")
    codes = unpack_integers(leaves["weight"], spec).to(torch.float32)
    groups = codes.unflatten(1, (scale.shape[1], -1))
    groups = groups - ((levels_of(spec) // 2) if zero is None else zero.unsqueeze(2))
    return groups.mul_(scale.unsqueeze(2)).flatten(1).to(dtype)


def pack_integers(codes: Tensor, spec: QSpec) -> Tensor:
    """uint8 codes [N, K] from 0 -> as they are stored: uint8 [N, K * b / 8], the first code in the lowest bits.

    int8: int8 [N, K] where symmetric, uint8 else.
    """
    bits = int(spec.bits or 8)
    if bits == 8:
        return (codes ^ 128).view(torch.int8) if spec.symmetric else codes
    if bits == 4:
        return pack4(codes)
    if bits == 2:
        first, second, third, fourth = codes.unflatten(1, (-1, 4)).unbind(2)
        return first | (second << 2) | (third << 4) | (fourth << 6)
    eight = codes.unflatten(1, (-1, 8)).to(torch.int32)
    word = (eight << torch.arange(0, 24, 3, device=codes.device, dtype=torch.int32)).sum(dim=2)
    return torch.stack([word >> shift & 255 for shift in (0, 8, 16)], dim=2).to(torch.uint8).flatten(1)


def unpack_integers(packed: Tensor, spec: QSpec) -> Tensor:
    """The uint8 codes [N, K], from 0, of which `pack_integers` made `packed`."""
    bits = int(spec.bits or 8)
    if bits == 8:
        return packed.view(torch.uint8) ^ 128 if spec.symmetric else packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    if bits == 2:
        return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    low, middle, high = packed.unflatten(1, (-1, 3)).to(torch.int32).unbind(2)
    word = low | (middle << 8) | (high << 16)
    return torch.stack([word >> shift & 7 for shift in range(0, 24, 3)], dim=2).to(torch.uint8).flatten(1)


def _groups(weight: Tensor, spec: QSpec) -> Tensor:
    """float32 [N, G, values of a group], filled up with zeros."""
    k = weight.shape[1]
    filled = F.pad(weight.float(), (0, spec.filled(k) - k)) if spec.filled(k) != k else weight.float()
    return filled.unflatten(1, (group_count(spec, k), -1))
