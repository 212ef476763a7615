"""A histogram of values as they stream by, whose range doubles when a value lies outside it.

The bins of a row cover [-limit, limit), limit a power of two. Doubling it joins bins in pairs about zero, and
histograms of different limits are added after the smaller was doubled, so that no count ever moves to a wrong bin: the
result does not depend on the order or the sizes of the batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightx2v.errors import LightX2VError

_SMALLEST_LIMIT = 2.0**-24
_SLAB_VALUES = 1 << 22


class Histogram:
    """Counts of values in `channels` independent rows (the heads of an attention; 1 for a tensor).

    counts int64 [C, bins] on the device of the first values; limit float64 [C]; low, high float32 [C], the exact
    extremes (inf and -inf before the first value); total int64 [C]. `bins` is a multiple of 4. The range is at most
    twice the largest absolute value, so at least a quarter of the bins lie on its side of zero.
    """

    def __init__(self, channels: int = 1, bins: int = 4096) -> None:
        if bins < 4 or bins % 4:
            raise ValueError(f"bins is a multiple of 4, not {bins}")
        self.bins = bins
        self.counts = torch.zeros(channels, bins, dtype=torch.int64)
        self.limit = torch.full((channels,), _SMALLEST_LIMIT, dtype=torch.float64)
        self.low = torch.full((channels,), torch.inf)
        self.high = torch.full((channels,), -torch.inf)

    @property
    def total(self) -> Tensor:
        """How many values each row has seen, int64 [C]."""
        return self.counts.sum(dim=1)

    @property
    def edges(self) -> Tensor:
        """The edges of the bins, float64 [C, bins + 1]."""
        steps = torch.arange(-self.bins // 2, self.bins // 2 + 1, dtype=torch.float64, device=self.limit.device)
        return steps * (self.limit[:, None] / (self.bins // 2))

    def widen(self, low: Tensor, high: Tensor) -> None:
        """Take note of extremes [C], of values that are not all counted."""
        self.low = torch.minimum(self.low, low.to(self.low))
        self.high = torch.maximum(self.high, high.to(self.high))
        self._cover(torch.maximum(self.high, -self.low).double())

    def update(self, values: Tensor) -> None:
        """Count values [C, n] of any float dtype. Raises LightX2VError for inf and NaN."""
        if not values.numel():
            return
        if self.counts.device != values.device:
            self._move(values.device)
        self.widen(*values.aminmax(dim=1))
        scale = (self.bins // 2) / self.limit[:, None]
        first = torch.arange(len(values), device=values.device)[:, None] * self.bins + self.bins // 2
        counts = torch.zeros(self.counts.numel(), dtype=torch.int64, device=values.device)
        for slab in values.split(max(1, _SLAB_VALUES // len(values)), dim=1):
            # Times a power of two: exact in float32, so that edges are where they are said to be.
            index = (slab.float() * scale.float()).floor_().long().add_(first)
            counts += torch.bincount(index.flatten(), minlength=counts.numel())
        self.counts += counts.view_as(self.counts)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram of as many rows and bins, as if its values had been seen here."""
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"histograms of {tuple(self.counts.shape)} and {tuple(other.counts.shape)} bins")
        other = Histogram.from_state(other.state())
        other._move(self.counts.device)
        self._cover(other.limit / 2)
        other._cover(self.limit / 2)
        self.counts = self.counts + other.counts
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors that can be stored."""
        return {"counts": self.counts, "limit": self.limit, "low": self.low, "high": self.high}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Histogram:
        """The histogram of which `state` is the state."""
        counts = state["counts"]
        made = cls(*counts.shape)
        made.counts, made.limit = counts.clone(), state["limit"].clone()
        made.low, made.high = state["low"].clone(), state["high"].clone()
        return made

    def _move(self, device: torch.device) -> None:
        self.counts, self.limit = self.counts.to(device), self.limit.to(device)
        self.low, self.high = self.low.to(device), self.high.to(device)

    def _cover(self, absmax: Tensor) -> None:
        """Double the limits until they are above absmax float64 [C]."""
        if not bool(absmax.isfinite().all()):
            raise LightX2VError("calibration", "an activation holds inf or NaN", do="check the weights and the dtype")
        needed = torch.ldexp(torch.ones_like(absmax), torch.frexp(absmax).exponent)  # the power of two above it
        doublings = torch.log2(torch.maximum(needed, self.limit) / self.limit).round().long()
        for _ in range(int(doublings.max())):
            grow = doublings > 0
            quarter = self.bins // 4
            joined = torch.zeros_like(self.counts)
            joined[:, quarter:-quarter] = self.counts.unflatten(1, (-1, 2)).sum(dim=2)
            self.counts = torch.where(grow[:, None], joined, self.counts)
            self.limit = torch.where(grow, 2 * self.limit, self.limit)
            doublings -= 1
