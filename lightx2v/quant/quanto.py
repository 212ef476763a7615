"""Weights as optimum-quanto quantizes and stores them (https://github.com/huggingface/optimum-quanto, 0.2.7).

8 bits: value = data * scale, one scale for a row. 4 and 2 bits: value = code * scale - shift, for groups of a row.
N rows, K columns (those of a convolution are all its inputs of an output), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.quant.integers import group_count, levels_of, pack_integers, unpack_integers
from lightx2v.quant.numerics import FP8_MAX, INT8_MAX
from lightx2v.quant.spec import QSpec

GROUPS = (128, 96, 64, 32)


def group_size(k: int) -> int:
    """Values under one scale of a row of k, of 4 or 2 bits; 0: the whole row.

    128, or the first of 96, 64 and 32 that divides k; rows of 128 and less, and ones that none divides, are whole.
    """
    return next((size for size in GROUPS if k > GROUPS[0] and k % size == 0), 0)


def weight_spec(dtype: str, k: int) -> QSpec:
    """The spec of a weight of k columns; `dtype` is int8, fp8, int4 or int2."""
    if dtype in ("int8", "fp8"):
        return QSpec(dtype, "channel")
    size = group_size(k)
    return QSpec(dtype, "group" if size else "channel", size, symmetric=False)


Ranges = tuple[Tensor, Tensor]
"""Scales and least values of groups, float32 [N, G] each: a group's codes stand for low, low + scale, ..."""


def ranges_of(weight: Tensor, spec: QSpec) -> Ranges:
    """MaxOptimizer's ranges of a float weight [N, K] of 4 or 2 bits: from the least to the greatest of each group."""
    low, high = _grouped(weight, spec).aminmax(dim=2)
    return _stored((high - low) / (levels_of(spec) - 1), weight.dtype), low


def codes_in(weight: Tensor, spec: QSpec, ranges: Ranges) -> Tensor:
    """The nearest codes of a float weight [N, K] of 4 or 2 bits, float32 [N, G, K/G]."""
    scale, low = (part.unsqueeze(2) for part in _ranges_as_stored(ranges, weight.dtype))
    return ((_grouped(weight, spec) - low) / scale).round_().clamp_(0, levels_of(spec) - 1)


def round_weight(weight: Tensor, spec: QSpec, ranges: Ranges | None = None) -> Tensor:
    """A float weight [N, K] as it is once it is quantized, in its dtype."""
    codes, scale, low = _codes(weight, spec, ranges)
    values = codes.float() * scale
    return (values if low is None else values + low).flatten(1).to(weight.dtype)


def quanto_leaves(weight: Tensor, spec: QSpec, ranges: Ranges | None = None) -> dict[str, Tensor]:
    """The tensors that libraries compute with (`quant.formats`) of a float weight [N, K].

    Scales are AbsmaxOptimizer's and MaxOptimizer's, computed in float32 and rounded to the weight's dtype, in which
    they are stored; so that float32 weights give quanto's codes, bit by bit. A scale of 0 becomes 1. With `ranges`, for
    4 and 2 bits, those are taken and values outside of them are clipped.
    """
    codes, scale, low = _codes(weight, spec, ranges)
    if low is None:
        return {"weight": codes.flatten(1), "weight_scale": scale.flatten(1)}
    flat, k = codes.to(torch.uint8).flatten(1), weight.shape[1]
    return {
        "weight": pack_integers(F.pad(flat, (0, spec.filled(k) - k)), spec),
        "weight_scale": scale.squeeze(2),
        "weight_zero": (-low / scale).squeeze(2),
    }


def _grouped(weight: Tensor, spec: QSpec) -> Tensor:
    """float32 [N, G, K/G]."""
    return weight.float().unflatten(1, (group_count(spec, weight.shape[1]), -1))


def _codes(weight: Tensor, spec: QSpec, ranges: Ranges | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, G, K/G], and scales and the least value, both [N, G, 1], of the groups that have one."""
    if spec.is_integer:
        scale, low = _ranges_as_stored(ranges_of(weight, spec) if ranges is None else ranges, weight.dtype)
        return codes_in(weight, spec, (scale, low)), scale.unsqueeze(2), low.unsqueeze(2)
    groups = _grouped(weight, spec)
    amax = groups.abs().amax(dim=2, keepdim=True)
    if spec.dtype == "fp8":
        scale = _stored(amax / FP8_MAX, weight.dtype)
        return (groups / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale, None
    scale = _stored(amax / INT8_MAX, weight.dtype)
    return (groups / scale).round_().clamp_(-INT8_MAX - 1, INT8_MAX).to(torch.int8), scale, None


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype).float()
    return torch.where(rounded == 0, 1.0, rounded)


def _ranges_as_stored(ranges: Ranges, dtype: torch.dtype) -> Ranges:
    """As the numbers of a weight's dtype that files hold."""
    return _stored(ranges[0], dtype), ranges[1].to(dtype).float()


def written_weight(leaves: Mapping[str, Tensor], spec: QSpec, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """quanto's tensors by their names after `<layer>.weight.`, with scales in the weight's dtype."""
    scale = leaves["weight_scale"]
    if not spec.is_integer:
        return {"_data": leaves["weight"], "_scale": scale.reshape(-1, 1).to(dtype)}
    codes = unpack_integers(leaves["weight"], spec)[:, :k].unflatten(1, (scale.shape[1], -1)).flatten(0, 1)
    shift = (leaves["weight_zero"] * scale).reshape(-1, 1)
    return {
        "_data._data": pack_rows(codes, int(spec.bits or 8)),
        "_scale": scale.reshape(-1, 1).to(dtype),
        "_shift": shift.to(dtype),
    }


def read_weight(tensors: Mapping[str, Tensor], spec: QSpec, n: int, k: int) -> dict[str, Tensor]:
    """What `written_weight` was given, from the tensors of a weight [n, k]. An integer shift is a zero point."""
    scale = tensors["_scale"].float()
    if not spec.is_integer:
        return {"weight": tensors["_data"].flatten(1), "weight_scale": scale.reshape(n, 1)}
    bits, groups = int(spec.bits or 8), group_count(spec, k)
    codes = unpack_rows(tensors["_data._data"], bits, n * groups).reshape(n, k)
    shift = tensors["_shift"]
    zero = shift.float() / scale if shift.is_floating_point() else shift.float()
    return {
        "weight": pack_integers(F.pad(codes, (0, spec.filled(k) - k)), spec),
        "weight_scale": scale.reshape(n, groups),
        "weight_zero": zero.reshape(n, groups),
    }


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, C] -> uint8 [ceil(R * bits / 8), C]: row r + i * rows is in row r, from bit i * `bits` on."""
    rows = -(-codes.shape[0] * bits // 8)
    parts = F.pad(codes, (0, 0, 0, rows * 8 // bits - codes.shape[0])).split(rows)
    packed = torch.zeros_like(parts[0])
    for index, part in enumerate(parts):
        packed |= part << (bits * index)
    return packed


def unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The first `rows` rows of what `pack_rows` was given."""
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)])[:rows]
