"""Multipliers for the channels of an input, chosen with the layers that read it in view."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from lightx2v.calibrate.fake import fake_input, fake_weight
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.calibration.lowrank import truncated_svd
from lightx2v.quant.calibration.observers import InputStatistics
from lightx2v.quant.calibration.ranges import Range
from lightx2v.quant.calibration.search import OutputError, Rule, awq_search, flexible_search, none, svdquant_search
from lightx2v.quant.calibration.smoothing import balance, iterative_smooth, smoothquant, weight_absmax

ALPHAS = {"smoothquant": 0.5, "iterative": 0.9}
"""Where the configuration gives none."""
STRENGTHS = (1.0, 0.75, 0.5, 0.25)
CHANNELS = 512
"""Output channels of each weight that a search looks at, spread evenly."""


def is_smoothed(recipe: CalibrationConfig, name: str) -> bool:
    """Whether the recipe balances the channels of a layer."""
    return recipe.smooth != "none" and any(fnmatchcase(name, glob) for glob in recipe.smooth_layers)


def find_multiplier(
    recipe: CalibrationConfig, scheme: Scheme, weights: Sequence[Tensor], seen: InputStatistics, rotation: int
) -> Tensor | None:
    """The multiplier [K], float32, of the input of `weights`, each [N, K]; None where none is better than none.

    By the error of the outputs on the tokens that were kept, see `_Trial`. A method that searches has its multiplier by
    that error; of the others the weaker ones, m^s of `STRENGTHS`, are tried as well.
    """
    trial, rule = _Trial(recipe, scheme, weights, seen, rotation), _given_rule(recipe, weights)
    if rule is not None:
        tried = [_weaker(rule, strength) for strength in STRENGTHS]
        best = min(tried, key=trial)
        return best(seen.absmax) if trial(best) < trial(none) else None
    if recipe.smooth == "awq":
        found = awq_search(seen.mean_abs, weights, trial)
    else:
        search = flexible_search if recipe.smooth == "flexible" else svdquant_search
        found = search(seen.absmax, weights, trial)
    return found.multiplier if found.alpha or found.beta else None


def _given_rule(recipe: CalibrationConfig, weights: Sequence[Tensor]) -> Rule | None:
    """The rule of a method whose exponents are known beforehand."""
    alpha = recipe.alpha
    if recipe.smooth in ALPHAS:
        made = smoothquant if recipe.smooth == "smoothquant" else iterative_smooth
        return partial(made, weights=weights, alpha=ALPHAS[recipe.smooth] if alpha is None else alpha)
    if alpha is None or recipe.beta is None:
        return None
    return partial(balance, weight_span=weight_absmax(weights), alpha=alpha, beta=recipe.beta)


def _weaker(rule: Rule, strength: float) -> Rule:
    return lambda span: rule(span) ** strength


class _Trial:
    """The error of a rule for multipliers.

    Where inputs are quantized by a range that is found beforehand, a rule is tried by cross-validation: on tokens of
    each part of the requests, with the multiplier and the range that the others give. For a multiplier makes channels
    as large as the largest, and any of them may pass the range in inputs that neither was made of.
    """

    def __init__(
        self,
        recipe: CalibrationConfig,
        scheme: Scheme,
        weights: Sequence[Tensor],
        seen: InputStatistics,
        rotation: int,
    ) -> None:
        assert scheme.weight is not None and seen.sample is not None
        self.activation, self.seen = scheme.activation, seen
        self.means = recipe.smooth == "awq"
        # A rotation's range is not known from that of the channels.
        self.ranged = self.activation is not None and self.activation.is_calibrated and not rotation
        some = [weight[:: max(1, weight.shape[0] // CHANNELS)] for weight in weights]
        rank = recipe.rank if recipe.smooth == "svdquant" else 0
        low_rank = (lambda smoothed: truncated_svd(smoothed, rank)) if rank else None
        self.rows, folds = seen.sample.rows.to(weights[0].device).float(), seen.sample.folds
        self.parts: dict[int | None, Tensor] = {None: torch.ones_like(folds, dtype=torch.bool)}
        """Which of the rows a rule is tried on, by the part of the requests that its spans are not of."""
        if self.ranged and len(numbers := folds.unique().tolist()) > 1:
            self.parts = {number: folds == number for number in numbers}
        quantize = fake_weight(scheme.weight)
        self.outputs = {
            part: OutputError(self.rows[own], some, quantize, None, low_rank, rotation)
            for part, own in self.parts.items()
        }

    def __call__(self, rule: Rule) -> float:
        wrong = 0.0
        for part, output in self.outputs.items():
            spans = self.seen.spans(but=part)
            multiplier = rule(spans.mean_abs if self.means else spans.absmax)
            limits = self._limits(multiplier, part, spans.absmax) if self.ranged else None
            output.fake_quantize_input = fake_input(self.activation, limits)
            wrong += output(multiplier) * output.energy
        return wrong / sum(output.energy for output in self.outputs.values())

    def _limits(self, multiplier: Tensor, part: int | None, absmax: Tensor) -> Range:
        """The range of the inputs, less those of a part, times the multiplier."""
        others = self.rows if part is None else self.rows[~self.parts[part]]
        low, high = (others * multiplier).aminmax()
        # Of the extremes of channels only the absolute values are known: the rows say how skew they are.
        wider = (absmax * multiplier).max() / torch.maximum(-low, high).clamp(min=torch.finfo(low.dtype).tiny)
        return Range(float(low * wider), float(high * wider))
