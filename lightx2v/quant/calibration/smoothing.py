"""Multipliers that move outliers of a linear's input into its weight, or back: x' = x * m, W' = W / m.

x' W'^T = x W^T, but the codes of x' and W' hold other errors; `quant.around` applies them. K input channels; weights
[N, K] that share the input get one multiplier. A[k] is a span of the input's channel k and W[k] that of all weights'
column k. Multipliers are float32 [K], finite and positive; a channel whose input or weights are all zero has 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_SPAN = 1e-5


def weight_absmax(weights: Sequence[Tensor]) -> Tensor:
    """W: the largest absolute value of each column of all weights [N, K], float32 [K]."""
    return torch.stack([weight.detach().abs().amax(dim=0).float() for weight in weights]).amax(dim=0)


def weight_mean_abs(weights: Sequence[Tensor]) -> Tensor:
    """The mean |value| of each column, every row first divided by its largest, float32 [K]: AWQ's span of weights."""
    rows = torch.cat([weight.detach().float() for weight in weights]).abs()
    return (rows / rows.amax(dim=1, keepdim=True).clamp(min=SMALLEST_SPAN)).mean(dim=0)


def balance(input_span: Tensor, weight_span: Tensor, alpha: float, beta: float) -> Tensor:
    """m = W^beta / A^alpha, scaled so that the middle between its largest and its smallest is 1."""
    spans_in, spans_weight = input_span.double(), weight_span.double()
    alive = (spans_in > 0) & (spans_weight > 0)
    ratio = spans_weight.clamp(min=SMALLEST_SPAN) ** beta / spans_in.clamp(min=SMALLEST_SPAN) ** alpha
    if not bool(alive.any()):
        return torch.ones_like(ratio, dtype=torch.float32)
    low, high = ratio[alive].aminmax()
    return torch.where(alive, ratio / (low * high).sqrt(), 1.0).float()


def smoothquant(input_absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """SmoothQuant (arXiv 2211.10438; msModelSlim's m1): m = W^(1 - alpha) / A^alpha, of absolute maxima.

    With `input_absmax` of ones it needs no data: only columns of the weights are evened out.
    """
    return _plain(input_absmax, weight_absmax(weights), alpha, SMALLEST_SPAN)


def iterative_smooth(
    input_absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.9, smallest: float = 1e-5
) -> Tensor:
    """msModelSlim's m4 (iter_smooth): 1 / m = A^alpha / W^(1 - alpha), at least `smallest`."""
    return _plain(input_absmax, weight_absmax(weights), alpha, smallest)


def _plain(input_span: Tensor, weight_span: Tensor, alpha: float, smallest: float) -> Tensor:
    """1 / (A^alpha / W^(1 - alpha)), where neither is zero; not rescaled, as it is in the papers."""
    spans_in, spans_weight = input_span.double(), weight_span.double()
    alive = (spans_in > 0) & (spans_weight > 0)
    divisor = spans_in**alpha / spans_weight.clamp(min=SMALLEST_SPAN) ** (1 - alpha)
    return torch.where(alive, 1 / divisor.clamp(min=smallest), 1.0).float()
