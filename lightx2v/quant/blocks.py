"""Microscaling (MX) formats and NVFP4: short codes with one scale for 16 or 32 values of a row.

MX: OCP Microscaling Formats v1.0, with the scale rounded up to a power of two, as cuBLAS, torchao (RCEIL) and
LightX2V's kernels do: no value saturates. NVFP4: scales of 16 values in e4m3 under one float32 scale of the tensor
(cuBLAS' documentation, "1D block scaling"). A block with an inf or NaN has NaN for its scale.

Rows are filled up with zeros to whole blocks. R rows, K columns, G blocks of a row; everything is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.quant.minifloat import E2M1, E3M2, Minifloat, lookup_pairs
from lightx2v.quant.numerics import FP8_MAX
from lightx2v.quant.packing import pack4, pack6, pairs6
from lightx2v.quant.spec import QSpec

NVFP4_LEVELS = FP8_MAX * E2M1.largest
"""2688: the largest code times the largest scale. The global scale is this over the largest value of the tensor."""
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
ELEMENTS: dict[str, Minifloat] = {"mxfp6": E3M2, "mxfp4": E2M1, "nvfp4": E2M1}
"""Formats whose elements are not e4m3."""

SLAB_ELEMENTS = {"cpu": 1 << 16, "accelerator": 1 << 24}
"""Values that are quantized at a time; few on a CPU, so that they stay in its caches."""

_INT4_VALUES = tuple(float(code - 8) for code in range(16))
_E2M1_VALUES, _E3M2_VALUES = tuple(E2M1.values()), tuple(E3M2.values())
_SMALLEST_AMAX = 1e-30  # of a tensor, so that its global scale stays finite


class Blocks(NamedTuple):
    """value = element * scale (/ global scale for nvfp4)."""

    elements: Tensor
    """[R, K] numbers of the element's format as e4m3, which has them all, or as they are stored (`packed`)."""
    scale: Tensor
    """[R, G]: float8_e8m0fnu for MX, float8_e4m3fn for nvfp4."""


def fill_up(x: Tensor, spec: QSpec) -> Tensor:
    """[R, K] with zeros appended to whole blocks."""
    missing = spec.filled(x.shape[1]) - x.shape[1]
    return F.pad(x, (0, missing)) if missing else x


def by_rows(x: Tensor, make: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`make` of slabs of rows, put together: its intermediate results would be many times the size of x."""
    size = SLAB_ELEMENTS["cpu" if x.device.type == "cpu" else "accelerator"]
    slabs = (x,) if torch.compiler.is_compiling() else x.split(max(1, size // max(1, x.shape[1])))
    parts = [make(slab) for slab in slabs]
    return tuple(torch.cat(same) for same in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]


def _groups(x: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """float32 [R, G, size] and the largest absolute value of each group [R, G, 1]."""
    groups = fill_up(x.float(), spec).unflatten(1, (-1, spec.size))
    return groups, groups.abs().amax(dim=2, keepdim=True)


def mx_blocks(x: Tensor, spec: QSpec, packed: bool = False) -> Blocks:
    """Elements and scales of [R, K] values: scale = 2 ** ceil(log2(amax / largest element)), at least 2 ** -127."""
    element = ELEMENTS.get(spec.dtype)
    fraction, power = math.frexp(element.largest if element else FP8_MAX)  # largest = 2 * fraction * 2 ** (power - 1)
    carry = 0x7FFFFF - int((2 * fraction - 1) * 2**23)

    def make(slab: Tensor) -> tuple[Tensor, Tensor]:
        groups, amax = _groups(slab, spec)
        # ceil(log2(amax / largest)), exactly: the exponents' difference, plus one where amax has the larger mantissa.
        exponent = (((amax.view(torch.int32) + carry) >> 23) - (power - 1)).clamp_(min=0)
        scaled = (groups * ((254 - exponent) << 23).view(torch.float32)).flatten(1)
        elements = element.round(scaled) if element else scaled
        scale = torch.where(amax.isfinite(), exponent, 255).to(torch.uint8).squeeze(2)
        return (pack_elements(elements, spec) if packed else elements.to(E4M3)), scale

    elements, scale = by_rows(x, make)
    return Blocks(elements, scale.view(E8M0))


def global_scale(amax: Tensor) -> Tensor:
    """NVFP4's scale of a whole tensor from its largest absolute value: 2688 / amax, and 1 for a tensor of zeros."""
    amax = amax.float()
    return torch.where(amax == 0, 1.0, torch.full_like(amax, NVFP4_LEVELS) / amax.clamp(min=_SMALLEST_AMAX))


def nvfp4_blocks(x: Tensor, spec: QSpec, tensor_scale: Tensor, packed: bool = False) -> Blocks:
    """Elements and scales of [R, K] values under a global scale.

    scale = e4m3(amax / 6 * tensor_scale), at most 448; elements are x * tensor_scale / scale, and 0 where scale is 0.
    """

    def make(slab: Tensor) -> tuple[Tensor, Tensor]:
        groups, amax = _groups(slab, spec)
        wanted = (amax * (1 / E2M1.largest) * tensor_scale).clamp_(max=FP8_MAX)
        scale = torch.where(amax.isfinite(), wanted, torch.nan).to(E4M3)
        stored = scale.float()
        inverse = torch.where(stored == 0, 0.0, tensor_scale / stored)
        elements = E2M1.round((groups * inverse).flatten(1))
        return (pack_elements(elements, spec) if packed else elements.to(E4M3)), scale.squeeze(2).view(torch.uint8)

    elements, scale = by_rows(x, make)
    return Blocks(elements, scale.view(E4M3))


def pack_elements(elements: Tensor, spec: QSpec) -> Tensor:
    """Numbers of a format [R, K], float32, as they are stored: float8_e4m3fn [R, K], or uint8 [R, K/2] or [R, 3K/4]."""
    if spec.dtype == "mxfp8":
        return elements.to(E4M3)
    codes = ELEMENTS[spec.dtype].encode(elements)
    return pack6(codes) if spec.dtype == "mxfp6" else pack4(codes)


def unpack_elements(packed: Tensor, spec: QSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [R, K] of stored codes, exactly: float32, or a dtype of 16 bits."""
    if spec.dtype == "mxfp8":
        return packed.to(dtype)
    if spec.dtype == "mxfp6":
        return lookup_pairs(pairs6(packed), _E3M2_VALUES, dtype)
    return lookup_pairs(packed, _INT4_VALUES if spec.dtype == "int4" else _E2M1_VALUES, dtype)


def scale_blocks(elements: Tensor, scale: Tensor, size: int) -> Tensor:
    """Multiply the elements [R, K] in place, each with the scale [R, G] of its block."""
    # Repeated first: torch's loops over rows of 16 are slow.
    return elements.mul_(scale.to(elements.dtype).repeat_interleave(size, dim=1))
