"""The values that a few bits can stand for, as the solvers see them: integers or a table's values, times a scale.

A grid knows how to choose a scale for the values of a group, and how to go from values to codes and back. The solvers
decide which values to encode. N output channels, K input channels, G groups of a row; all is float32 but the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.quant.blocks import by_rows
from lightx2v.quant.integers import integer_scales

_SHRINKS = 20
"""Steps of the search for a smaller range, down to half of it."""


class Scales(NamedTuple):
    """What makes values of codes: float32 tensors that broadcast against the codes; no zero point where symmetric."""

    scale: Tensor
    zero: Tensor | None


class Groups(NamedTuple):
    """A weight as codes uint8 [N, K] under scale and zero float32 [N, G]; the last group may be a part."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class Grid(Protocol):
    """How `size` neighbours of a row become codes; 0: a whole row."""

    @property
    def size(self) -> int: ...

    def fit(self, rows: Tensor) -> Scales:
        """Scales [R, 1] for the values [R, C] of R groups."""
        ...

    def encode(self, values: Tensor, scales: Scales) -> Tensor:
        """The codes, uint8, whose values are nearest."""
        ...

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """The values of codes."""
        ...


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """Codes from 0 to 2^b - 1 as `quant.integers` has them: (code - zero) * scale, zero 2^(b-1) where symmetric.

    `shrink` tries smaller ranges, down to half, and takes for each group the one of least squared error, as GPTQ's
    reference code does.
    """

    bits: int
    size: int
    symmetric: bool = True
    shrink: bool = False

    def fit(self, rows: Tensor) -> Scales:
        low, high = rows.aminmax(dim=1, keepdim=True)
        best = self._scales(low, high)
        if not self.shrink:
            return best
        least = self._error(rows, best)
        for step in range(1, _SHRINKS):
            part = 1 - step / (2 * _SHRINKS)
            tried = self._scales(part * low, part * high)
            error = self._error(rows, tried)
            better, least = error < least, torch.minimum(error, least)
            zero = None if best.zero is None or tried.zero is None else torch.where(better, tried.zero, best.zero)
            best = Scales(torch.where(better, tried.scale, best.scale), zero)
        return best

    def encode(self, values: Tensor, scales: Scales) -> Tensor:
        codes = values / scales.scale + (2 ** (self.bits - 1) if scales.zero is None else scales.zero)
        return codes.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        middle = 2 ** (self.bits - 1) if scales.zero is None else scales.zero
        return (codes.float() - middle) * scales.scale

    def _scales(self, low: Tensor, high: Tensor) -> Scales:
        return Scales(*integer_scales(low, high, 2**self.bits, self.symmetric))

    def _error(self, rows: Tensor, scales: Scales) -> Tensor:
        return (self.decode(self.encode(rows, scales), scales) - rows).square().sum(dim=1, keepdim=True)


@dataclass(frozen=True, slots=True)
class CodebookGrid:
    """Codes that number the values of a table: value = values[code] * scale, scale = amax / the table's largest.

    `round_scale` rounds the scales to the numbers that can be stored: for nvfp4 those of e4m3 over the global scale.
    """

    values: tuple[float, ...]
    size: int
    round_scale: Callable[[Tensor], Tensor] | None = None

    def fit(self, rows: Tensor) -> Scales:
        amax = rows.abs().amax(dim=1, keepdim=True)
        scale = amax / torch.full_like(amax, max(abs(value) for value in self.values))
        return Scales(scale if self.round_scale is None else self.round_scale(scale), None)

    def encode(self, values: Tensor, scales: Scales) -> Tensor:
        table, order = torch.tensor(self.values, device=values.device).sort(stable=True)
        scaled = values / torch.where(scales.scale == 0, 1.0, scales.scale)
        return order.to(torch.uint8)[torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)]

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        return torch.tensor(self.values, device=codes.device)[codes.int()] * scales.scale


def group_rows(weight: Tensor, size: int) -> Tensor:
    """float32 [N * G, size], one group a row, the last of a row of the weight filled up with zeros."""
    width = size or weight.shape[1]
    return F.pad(weight.float(), (0, -weight.shape[1] % width)).reshape(-1, width)


def by_groups(weight: Tensor, size: int, solve: Callable[[Tensor], tuple[Tensor, Scales]]) -> Groups:
    """Codes [R, size] and scales [R, 1] that `solve` finds for groups [R, size], put together for a weight [N, K]."""
    k = weight.shape[1]

    def make(slab: Tensor) -> tuple[Tensor, ...]:
        codes, scales = solve(group_rows(slab, size))
        scale = [part.view(len(slab), -1) for part in scales if part is not None]
        return (codes.view(len(slab), -1)[:, :k], *scale)

    codes, scale, *zero = by_rows(weight, make)
    return Groups(codes, scale, zero[0] if zero else None)


def nearest(weight: Tensor, grid: Grid) -> Groups:
    """A weight [N, K] of any float dtype, every value by itself rounded to the grid."""

    def solve(rows: Tensor) -> tuple[Tensor, Scales]:
        scales = grid.fit(rows)
        return grid.encode(rows, scales), scales

    return by_groups(weight, grid.size, solve)


def dequantize(groups: Groups, grid: Grid) -> Tensor:
    """The weight float32 [N, K] that codes and scales stand for."""
    n, k = groups.codes.shape
    width = grid.size or k
    codes = F.pad(groups.codes, (0, -k % width)).view(n, -1, width)
    zero = None if groups.zero is None else groups.zero.unsqueeze(2)
    return grid.decode(codes, Scales(groups.scale.unsqueeze(2), zero)).view(n, -1)[:, :k]


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """What `nearest` makes of a weight [N, K], as float32 values; of activations [M, K] as well."""
    k = weight.shape[1]

    def make(slab: Tensor) -> tuple[Tensor, ...]:
        rows = group_rows(slab, grid.size)
        scales = grid.fit(rows)
        return (grid.decode(grid.encode(rows, scales), scales).view(len(slab), -1)[:, :k],)

    return by_rows(weight, make)[0]
