"""Searches for the multiplier of `smoothing` that leaves the least error in the output of the linears.

A search tries rules, which make multipliers of spans of the input, so that a rule can be tried on inputs that the spans
are not of. `OutputError` is the error of a multiplier that the papers take. Each search tries the multiplier of ones
first and keeps it where nothing is better, so that no search makes things worse than no smoothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightx2v.quant.around import Around, fold_around
from lightx2v.quant.calibration.smoothing import balance, weight_absmax, weight_mean_abs

Rule = Callable[[Tensor], Tensor]
"""From a span of the input's channels, float32 [K], to their multiplier, float32 [K]."""
Error = Callable[[Rule], float]
"""From a rule to the error that its multipliers leave."""
FakeQuantize = Callable[[Tensor], Tensor]
"""From a tensor to what its codes stand for, float32 of the same shape."""


class Found(NamedTuple):
    """The best multiplier float32 [K] of a search, its error, and the exponents that made it (0, 0: ones)."""

    multiplier: Tensor
    error: float
    alpha: float
    beta: float


def on_span(error: Callable[[Tensor], float], span: Tensor) -> Error:
    """The error of the multiplier that a rule makes of `span`."""
    return lambda rule: error(rule(span))


class OutputError:
    """The squared error of the outputs of linears for sampled inputs, as a share of the outputs' squares.

    `rows` [R, K] are inputs, `weights` [N, K] those that share them. `fake_quantize_input` rounds an input, none keeps
    it as it is. `low_rank` gives, of a smoothed weight, the factors (down [r, K], up [N, r]) that stay beside the codes
    of the rest (SVDQuant), which are computed of the smoothed input before it is rounded. `rotation` is the size of the
    rotation that follows the multiplier, 0 for none.
    """

    def __init__(
        self,
        rows: Tensor,
        weights: Sequence[Tensor],
        fake_quantize_weight: FakeQuantize,
        fake_quantize_input: FakeQuantize | None = None,
        low_rank: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        rotation: int = 0,
    ) -> None:
        self.rows = rows.float()
        self.weights = [weight.float() for weight in weights]
        self.fake_quantize_weight, self.fake_quantize_input = fake_quantize_weight, fake_quantize_input
        self.low_rank, self.rotation = low_rank, rotation
        self.wanted = [self.rows @ weight.T for weight in self.weights]
        self.energy = sum(float(output.double().square().sum()) for output in self.wanted) or 1.0

    def __call__(self, multiplier: Tensor) -> float:
        x = Around(multiplier, self.rotation).input(self.rows)
        rounded = x if self.fake_quantize_input is None else self.fake_quantize_input(x).float()
        error = 0.0
        for weight, wanted in zip(self.weights, self.wanted, strict=True):
            smoothed = fold_around(weight, multiplier, self.rotation)
            missing = wanted
            if self.low_rank is not None:
                down, up = self.low_rank(smoothed)
                missing = wanted - (x @ down.T) @ up.T
                smoothed = smoothed - up @ down
            output = rounded @ self.fake_quantize_weight(smoothed).float().T
            error += float((output - missing).double().square().sum())
        return error / self.energy


def awq_search(input_mean_abs: Tensor, weights: Sequence[Tensor], error: Error, step: float = 0.05) -> Found:
    """AWQ (arXiv 2306.00978; msModelSlim's m3): 1 / m = A^alpha / W^beta, alpha from 0 to 1 by `step`.

    A is the mean |x| of a channel. For each alpha, beta is 0, as the paper has it, and 1 - alpha with W the weights'
    relative mean size, the weight-aware form of its reference code.
    """
    span = weight_mean_abs(weights)
    pairs = [(alpha, beta) for alpha in _grid(step) for beta in sorted({0.0, 1 - alpha})]
    return _best(input_mean_abs, span, pairs, error)


def flexible_search(input_absmax: Tensor, weights: Sequence[Tensor], error: Error, step: float = 0.05) -> Found:
    """msModelSlim's m6 (flex_smooth): 1 / m = A^alpha / W^beta, first alpha with beta = 1 - alpha, then beta alone."""
    span = weight_absmax(weights)
    first = _best(input_absmax, span, [(alpha, 1 - alpha) for alpha in _grid(step)], error)
    second = _best(input_absmax, span, [(first.alpha, beta) for beta in _grid(step)], error)
    return min(first, second, key=lambda found: found.error)


def svdquant_search(input_absmax: Tensor, weights: Sequence[Tensor], error: Error, grids: int = 20) -> Found:
    """SVDQuant (arXiv 2411.05007) as deepcompressor has it (alpha 0.5, beta -2): the same form, of absolute maxima.

    alpha takes `grids` - 1 values between 0 and 1, and beta with each of them 0 and 1 - alpha.
    """
    alphas = [step / grids for step in range(1, grids)]
    pairs = [(alpha, 0.0) for alpha in alphas] + [(alpha, 1 - alpha) for alpha in alphas]
    return _best(input_absmax, weight_absmax(weights), pairs, error)


def _grid(step: float) -> list[float]:
    """0 to 1 by `step`."""
    parts = round(1 / step)
    return [part / parts for part in range(parts + 1)]


def _best(input_span: Tensor, weight_span: Tensor, pairs: Iterable[tuple[float, float]], error: Error) -> Found:
    """The best of these exponents and of ones; the first of equals."""
    best = Found(torch.ones_like(input_span, dtype=torch.float32), error(none), 0.0, 0.0)
    for alpha, beta in pairs:
        if alpha or beta:
            rule = partial(balance, weight_span=weight_span, alpha=alpha, beta=beta)
            if (found := error(rule)) < best.error:
                best = Found(rule(input_span), found, alpha, beta)
    return best


def none(span: Tensor) -> Tensor:
    """The rule of no smoothing."""
    return torch.ones_like(span, dtype=torch.float32)
