"""What calibration keeps of the inputs of a linear: statistics that stream, never the inputs themselves.

M rows (tokens), K input channels. Statistics of parts of the data are merged as if all of it had been seen at once, so
that one set for each step of a request gives those of any group of steps.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.quant.calibration.histogram import Histogram

_SLAB_VALUES = 1 << 23
"""Values that are in float32 at a time."""


class RowSample:
    """A uniform sample, without replacement, of at most `rows` of all the rows seen.

    Every row draws a number from the seed's generator and the smallest ones stay (bottom-k sampling), so that samples
    can be merged; with different seeds, lest rows of the same number in both stand or fall together. The same rows in
    batches of the same sizes give the same sample. `folds` int64 [R] says which part of the data each row is of.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.size, self.seed, self.seen = rows, seed, 0
        self.rows = torch.empty(0, 0)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.folds = torch.empty(0, dtype=torch.int64)

    def update(self, x: Tensor, fold: int = 0) -> None:
        """See rows [M, K] of any dtype, of the part `fold` of the data."""
        # Seeded by what was seen before: a sample restored from its state goes on as if it had never stopped. torch's
        # generator for CPUs heeds 32 bits of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.seen}".encode()))
        keys = torch.rand(len(x), generator=generator, dtype=torch.float64)
        self.seen += len(x)
        kept = keys.topk(min(self.size, len(x)), largest=False, sorted=False).indices.sort().values
        self._keep(x[kept.to(x.device)].detach(), keys[kept], torch.full_like(kept, fold))

    def merge(self, other: RowSample) -> None:
        """Add another sample's rows, as if it had been one sample."""
        self.seen += other.seen
        self._keep(other.rows, other.keys, other.folds)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors that can be stored."""
        numbers = torch.tensor([self.size, self.seed, self.seen])
        return {"rows": self.rows, "keys": self.keys, "folds": self.folds, "numbers": numbers}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> RowSample:
        """The sample of which `state` is the state."""
        size, seed, seen = state["numbers"].tolist()
        made = cls(size, seed)
        made.rows, made.keys, made.seen = state["rows"].clone(), state["keys"].clone(), seen
        made.folds = state["folds"].clone()
        return made

    def _keep(self, rows: Tensor, keys: Tensor, folds: Tensor) -> None:
        if self.rows.numel():
            rows, keys = torch.cat((self.rows, rows.to(self.rows))), torch.cat((self.keys, keys))
            folds = torch.cat((self.folds, folds))
        if len(keys) > self.size:
            kept = keys.topk(self.size, largest=False, sorted=False).indices.sort().values
            rows, keys, folds = rows[kept.to(rows.device)], keys[kept], folds[kept]
        self.rows, self.keys, self.folds = rows, keys, folds


class ChannelSpans:
    """Of each channel of `count` rows the largest |x|, float32 [K], and the sum of |x|, float64 [K]."""

    def __init__(self, absmax: Tensor, sum_abs: Tensor, count: int = 0) -> None:
        self.absmax, self.sum_abs, self.count = absmax, sum_abs, count

    @classmethod
    def none(cls, channels: int, device: torch.device | None = None) -> ChannelSpans:
        """Those of no rows."""
        zeros = torch.zeros(channels, device=device)
        return cls(zeros, zeros.double())

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x| of each channel, float32 [K]."""
        return (self.sum_abs / max(self.count, 1)).float()

    def to(self, device: torch.device) -> ChannelSpans:
        """The same on another device."""
        return ChannelSpans(self.absmax.to(device), self.sum_abs.to(device), self.count)

    def __add__(self, other: ChannelSpans) -> ChannelSpans:
        """Those of the rows of both."""
        absmax = torch.maximum(self.absmax, other.absmax)
        return ChannelSpans(absmax, self.sum_abs + other.sum_abs, self.count + other.count)


class InputStatistics:
    """What the solvers need of the inputs x [M, K] of one linear, or of several that share theirs.

    count: rows seen. absmax, mean_abs float32 [K]: of each channel. low, high: the extremes of all. histogram: of all
    values, none with `bins` 0; of each update at most about `histogram_values` values, those of rows spread evenly,
    though the extremes are exact. gram float32 [K, K]: the sum of x^T x, with `gram`. sample: `rows` rows, where not 0.
    folds: what is known of the channels in each part of the data, for choices made by some and tried on the others.
    """

    def __init__(
        self,
        channels: int,
        *,
        bins: int = 4096,
        gram: bool = False,
        rows: int = 0,
        seed: int = 0,
        histogram_values: int = 1 << 20,
    ) -> None:
        self.channels, self.histogram_values = channels, histogram_values
        self.folds: dict[int, ChannelSpans] = {}
        self.low, self.high = float("inf"), -float("inf")
        self.histogram = Histogram(1, bins) if bins else None
        self.gram = torch.zeros(channels, channels) if gram else None
        self.sample = RowSample(rows, seed) if rows else None

    @property
    def count(self) -> int:
        return self.spans().count

    @property
    def absmax(self) -> Tensor:
        return self.spans().absmax

    @property
    def mean_abs(self) -> Tensor:
        return self.spans().mean_abs

    def spans(self, but: int | None = None) -> ChannelSpans:
        """Of all channels in all of the data, or in all parts but one."""
        chosen = [spans for fold, spans in self.folds.items() if fold != but]
        return sum(chosen[1:], start=chosen[0]) if chosen else ChannelSpans.none(self.channels)

    def update(self, x: Tensor, fold: int = 0) -> None:
        """See inputs [..., K] of any float dtype, of the part `fold` of the data. Raises LightX2VError for inf, NaN."""
        x = x.detach().flatten(0, -2)
        if x.shape[1] != self.channels:
            raise ValueError(f"inputs of {x.shape[1]} channels where there are {self.channels}")
        if not x.numel():
            return
        self._move(x.device)
        low, high = (float(extreme) for extreme in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not math.isfinite(high - low):
            raise LightX2VError("calibration", "an activation holds inf or NaN", do="check the weights and the dtype")
        for slab in x.split(max(1, _SLAB_VALUES // self.channels)):
            values = slab.float()
            magnitudes = values.abs()
            sums = magnitudes.sum(dim=0, dtype=torch.float64)
            self._add(fold, ChannelSpans(magnitudes.amax(dim=0), sums, len(slab)))
            if self.gram is not None:
                self.gram.addmm_(values.T, values)
        if self.histogram is not None:
            # An odd step is not likely to meet the same column of every picture.
            step = max(1, x.numel() // self.histogram_values) | 1
            self.histogram.update(x[::step].reshape(1, -1))
            self.histogram.widen(torch.tensor([low]), torch.tensor([high]))
        if self.sample is not None:
            self.sample.update(x, fold)

    def merge(self, other: InputStatistics) -> None:
        """Add what another saw of as many channels, made with the same options."""
        for fold, spans in other.folds.items():
            self._move(spans.absmax.device)
            self._add(fold, spans)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if self.histogram is not None and other.histogram is not None:
            self.histogram.merge(other.histogram)
        if self.gram is not None and other.gram is not None:
            self.gram = self.gram + other.gram
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors that can be stored."""
        numbers = torch.tensor([self.channels, self.histogram_values])
        extremes = torch.tensor([self.low, self.high], dtype=torch.float64)
        state = {"numbers": numbers, "extremes": extremes}
        for fold, spans in self.folds.items():
            state |= {f"absmax.{fold}": spans.absmax, f"sum_abs.{fold}": spans.sum_abs}
            state[f"count.{fold}"] = torch.tensor(spans.count)
        if self.gram is not None:
            state["gram"] = self.gram
        for name, part in (("histogram", self.histogram), ("sample", self.sample)):
            if part is not None:
                state |= {f"{name}.{key}": tensor for key, tensor in part.state().items()}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> InputStatistics:
        """The statistics of which `state` is the state."""
        channels, histogram_values = state["numbers"].tolist()
        made = cls(channels, bins=0, histogram_values=histogram_values)
        made.low, made.high = state["extremes"].tolist()
        for name, count in state.items():
            if name.startswith("count."):
                fold = name.removeprefix("count.")
                absmax, sum_abs = (state[f"{part}.{fold}"].clone() for part in ("absmax", "sum_abs"))
                made.folds[int(fold)] = ChannelSpans(absmax, sum_abs, int(count))
        made.gram = state["gram"].clone() if "gram" in state else None
        if "histogram.counts" in state:
            made.histogram = Histogram.from_state(_part(state, "histogram"))
        if "sample.rows" in state:
            made.sample = RowSample.from_state(_part(state, "sample"))
        return made

    def _add(self, fold: int, spans: ChannelSpans) -> None:
        self.folds[fold] = self.folds[fold] + spans if fold in self.folds else spans

    def _move(self, device: torch.device) -> None:
        if any(spans.absmax.device != device for spans in self.folds.values()):
            self.folds = {fold: spans.to(device) for fold, spans in self.folds.items()}
        if self.gram is not None:
            self.gram = self.gram.to(device)


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of a state, under the part's own names."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
