"""From a histogram to the range that codes of few bits cover, and from the range to scale and zero point.

A wider range rounds more coarsely, a narrower one clips; the rules differ in how they trade one for the other. Codes
are signed: symmetric value = code * scale with codes to +-(2^(b-1) - 1); else value = (code - zero) * scale with a
whole `zero` and codes from -2^(b-1) to 2^(b-1) - 1, so that the number 0 always has a code.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.quant.calibration.histogram import Histogram
from lightx2v.quant.numerics import WEIGHT_MIN_AMAX

Method = Literal["minmax", "percentile", "mse", "histogram", "mix"]
MIX_LARGEST_RANGE = 50.0
"""msModelSlim's `mix` takes the extremes of tensors that are wider than this."""
_CLIPS = 100
"""Parts of the range that the search of `mse` goes by."""
_PARTS = 8
"""Steps in which the search of `histogram` crosses empty bins."""
_CHUNK = 256


class Range(NamedTuple):
    """The least and the largest value that codes reach."""

    low: float
    high: float


def find_range(
    histogram: Histogram, method: Method, *, symmetric: bool, bits: int = 8, percent: float = 99.99
) -> Range:
    """The range of a histogram of one row by a rule; (0, 0) when it has seen nothing.

    minmax: the extremes. percentile: all but (100 - percent) % of the values, half of it on either side, or of the
    absolute values where symmetric. mse: the least expected error over clips of each side by hundredths of the range
    (as pytorch-quantization's, which has symmetric ranges only). histogram: the least expected error of the ranges
    passed by cutting values off the sparser side, one after the other (the path of torch.ao's HistogramObserver, which
    sees only the ranges that end at values and stops at the first rise). mix: msModelSlim's act_method 3, `histogram`
    where the range is at most 50, else `minmax`.
    """
    low, high = float(histogram.low[0]), float(histogram.high[0])
    if low > high:
        return Range(0.0, 0.0)
    if method == "mix":
        method = "histogram" if high - low <= MIX_LARGEST_RANGE else "minmax"
    if method == "minmax":
        return Range(low, high)
    if method == "percentile":
        return _percentile(histogram, percent, symmetric)
    if method == "mse":
        lows, highs = _clips(low, high, symmetric)
    else:
        lows, highs = _cuts(histogram)
    errors = _expected_errors(histogram, lows, highs, symmetric, bits)
    best = int(errors.argmin())
    return Range(float(lows[best]), float(highs[best]))


def range_parameters(found: Range, *, symmetric: bool, bits: int = 8) -> tuple[float, float]:
    """(scale, zero) of a range. It is widened to hold 0, and where asymmetric moved by up to half a step."""
    low, high = (torch.tensor([end], dtype=torch.float64) for end in found)
    scale, zero = _parameters(low, high, symmetric, bits)
    return float(scale), float(zero)


def expected_error(histogram: Histogram, found: Range, *, symmetric: bool, bits: int = 8) -> float:
    """The mean squared error of values that are spread evenly within each bin, rounded to the codes of a range."""
    lows, highs = (torch.tensor([end], dtype=torch.float64) for end in found)
    return float(_expected_errors(histogram, lows, highs, symmetric, bits))


def recall_window(values: Tensor, ratio: float = 0.9999) -> tuple[Tensor, Tensor]:
    """The ends [...] of the shortest window that holds floor(ratio * n) of the values [..., n], at least one.

    msModelSlim's rule for the queries, keys and values of each head; over several calls it takes the lowest and the
    highest end.
    """
    ordered = values.sort(dim=-1).values
    held = max(1, int(ratio * values.shape[-1]))
    starts, ends = ordered[..., : values.shape[-1] - held + 1], ordered[..., held - 1 :]
    best = (ends.float() - starts.float()).argmin(dim=-1, keepdim=True)
    return starts.gather(-1, best).squeeze(-1), ends.gather(-1, best).squeeze(-1)


def histogram_window(histogram: Histogram, ratio: float = 0.9999) -> tuple[Tensor, Tensor]:
    """`recall_window` of the values that a histogram counted, float32 [C] each.

    The window is of whole bins, so up to two bins longer than that of the values, and ends within the extremes.
    """
    lows, highs = [], []
    for counts, edges in zip(histogram.counts, histogram.edges, strict=True):
        below = F.pad(counts.cumsum(0), (1, 0))
        # For each start the first edge by which the window holds enough; past the last where there is none.
        ends = torch.searchsorted(below, below[:-1] + (ratio * below[-1]).long().clamp(min=1))
        lengths = ends - torch.arange(len(ends), device=ends.device)
        start = int(torch.where(ends < len(below), lengths, 2 * len(below)).argmin())
        lows.append(edges[start])
        highs.append(edges[min(int(ends[start]), len(edges) - 1)])
    low = torch.maximum(torch.stack(lows).float(), histogram.low)
    return low, torch.minimum(torch.stack(highs).float(), histogram.high)


def recall_scale(low: Tensor, high: Tensor, bits: int = 8) -> Tensor:
    """Symmetric scales float32 [...] of windows: the larger absolute end / (2^(b-1) - 1)."""
    return torch.maximum(high.float(), -low.float()).clamp(min=WEIGHT_MIN_AMAX) / (2 ** (bits - 1) - 1)


def _parameters(lows: Tensor, highs: Tensor, symmetric: bool, bits: int) -> tuple[Tensor, Tensor]:
    """scale and zero float64 of many ranges, the scale never less than that of a weight of zeros."""
    half = 2 ** (bits - 1)
    if symmetric:
        scale = torch.maximum(highs, -lows).clamp(min=WEIGHT_MIN_AMAX) / (half - 1)
        return scale, torch.zeros_like(scale)
    lows, highs = lows.clamp(max=0), highs.clamp(min=0)
    scale = (highs - lows).clamp(min=WEIGHT_MIN_AMAX) / (2 * half - 1)
    return scale, (-half - lows / scale).round().clamp(-half, half - 1)


def _expected_errors(histogram: Histogram, lows: Tensor, highs: Tensor, symmetric: bool, bits: int) -> Tensor:
    """`expected_error` of many ranges [R], exactly: the integral of the squared error over each bin, in closed form."""
    edges, counts = histogram.edges[0], histogram.counts[0].double()
    used = counts.nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    edges, counts = edges[first : last + 1], counts[first:last]
    half = 2 ** (bits - 1)
    errors = []
    for low, high in zip(lows.to(edges).split(_CHUNK), highs.to(edges).split(_CHUNK), strict=True):
        scale, zero = _parameters(low, high, symmetric, bits)
        steps = edges[None] / scale[:, None]
        least = (-half + symmetric - zero)[:, None]
        inside = torch.minimum(torch.maximum(steps, least), (half - 1 - zero)[:, None])
        # The integral of (t - round(t))^2 within the range, and of (t - end)^2 beyond it.
        whole = inside.round()
        integral = whole / 12 + (inside - whole) ** 3 / 3 + (steps - inside) ** 3 / 3
        density = counts / (edges[1:] - edges[:-1])
        errors.append((integral.diff(dim=1) * density).sum(dim=1) * scale**3)
    return torch.cat(errors) / counts.sum()


def _percentile(histogram: Histogram, percent: float, symmetric: bool) -> Range:
    counts, edges = histogram.counts[0].double(), histogram.edges[0]
    low, high = float(histogram.low[0]), float(histogram.high[0])
    middle = histogram.bins // 2
    left_out = 1 - percent / 100
    if symmetric:
        largest = _quantile(counts[middle:] + counts[:middle].flip(0), edges[middle:], 1 - left_out)
        return Range(max(low, -largest), min(high, largest))
    ends = (_quantile(counts, edges, share) for share in (left_out / 2, 1 - left_out / 2))
    return Range(max(low, next(ends)), min(high, next(ends)))


def _quantile(counts: Tensor, edges: Tensor, share: float) -> float:
    """The value below which a share of the values lies, which are spread evenly within each bin."""
    below = F.pad(counts.cumsum(0), (1, 0))
    wanted = share * below[-1]
    at = int(torch.searchsorted(below, wanted).clamp(1, len(counts)))
    part = (wanted - below[at - 1]) / counts[at - 1].clamp(min=1)
    return float(edges[at - 1] + part.clamp(0, 1) * (edges[at] - edges[at - 1]))


def _clips(low: float, high: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Ranges that are parts of (low, high), by hundredths of its longer side."""
    largest = max(high, -low)
    steps = torch.arange(1, _CLIPS + 1, dtype=torch.float64) * (largest / _CLIPS)
    if symmetric:
        return -steps, steps
    lows, highs = (-steps).clamp(min=min(low, 0.0)).unique(), steps.clamp(max=max(high, 0.0)).unique()
    pairs = torch.cartesian_prod(lows, highs)
    return pairs[:, 0], pairs[:, 1]


def _cuts(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """The ranges passed on the way from all bins to one, each step 1e-5 of the values off the sparser side.

    A step over many empty bins is made in parts.
    """
    counts = histogram.counts[0].cpu()
    below = (counts.cumsum(0).double() / counts.sum()).tolist()
    used = counts.nonzero().flatten().tolist()
    start, end, left, right, step = used[0], used[-1], 0.0, 1.0, 1e-5
    path = [(start, end)]
    while left < right and start < end:
        next_start, next_end = start, end
        while next_start < end and below[next_start] < left + step:
            next_start += 1
        while next_end > start and below[next_end] > right - step:
            next_end -= 1
        if next_start - start > end - next_end:
            path += [(part, end) for part in range(start, next_start, max(1, (next_start - start) // _PARTS))]
            start, left = next_start, left + step
        else:
            path += [(start, part) for part in range(end, next_end, -max(1, (end - next_end) // _PARTS))]
            end, right = next_end, right - step
    edges = histogram.edges[0].cpu()
    starts, ends = (torch.tensor(side) for side in zip(*path, strict=True))
    lows, highs = edges[starts], edges[ends + 1]
    low, high = float(histogram.low[0]), float(histogram.high[0])
    return lows.clamp(low, high), highs.clamp(low, high)
