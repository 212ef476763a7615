"""Multipliers for the channels of an input, chosen with the layers that read it in view."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightx2v.calibrate.fake import fake_input, fake_weight
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.calibration.lowrank import truncated_svd
from lightx2v.quant.calibration.observers import InputStatistics
from lightx2v.quant.calibration.search import OutputError, awq_search, flexible_search, svdquant_search
from lightx2v.quant.calibration.smoothing import balance, iterative_smooth, smoothquant, weight_absmax

ALPHAS = {"smoothquant": 0.5, "iterative": 0.9}
"""Where the configuration gives none."""
CHANNELS = 512
"""Output channels of each weight that a search looks at, spread evenly."""


def is_smoothed(recipe: CalibrationConfig, name: str) -> bool:
    """Whether the recipe balances the channels of a layer."""
    return recipe.smooth != "none" and any(fnmatchcase(name, glob) for glob in recipe.smooth_layers)


def find_multiplier(
    recipe: CalibrationConfig, scheme: Scheme, weights: Sequence[Tensor], seen: InputStatistics, rotation: int
) -> Tensor | None:
    """The multiplier [K], float32, of the input of `weights`, each [N, K]; None where the method's is worse than none.

    Worse: by the error of the outputs on the tokens that were kept, with the input's range as it would be.
    """
    error, alpha = _Error(recipe, scheme, weights, seen, rotation), recipe.alpha
    if recipe.smooth == "smoothquant":
        made = smoothquant(seen.absmax, weights, ALPHAS["smoothquant"] if alpha is None else alpha)
    elif recipe.smooth == "iterative":
        made = iterative_smooth(seen.absmax, weights, ALPHAS["iterative"] if alpha is None else alpha)
    elif alpha is not None and recipe.beta is not None:
        made = balance(seen.absmax, weight_absmax(weights), alpha, recipe.beta)
    elif recipe.smooth == "awq":
        made = awq_search(seen.mean_abs, weights, error).multiplier
    else:
        search = flexible_search if recipe.smooth == "flexible" else svdquant_search
        made = search(seen.absmax, weights, error).multiplier
    return made if error(made) < error(torch.ones_like(made)) else None


class _Error:
    """The error of a multiplier."""

    def __init__(
        self,
        recipe: CalibrationConfig,
        scheme: Scheme,
        weights: Sequence[Tensor],
        seen: InputStatistics,
        rotation: int,
    ) -> None:
        assert scheme.weight is not None and seen.sample is not None
        self.activation, self.absmax, self.rotation = scheme.activation, seen.absmax, rotation
        some = [weight[:: max(1, weight.shape[0] // CHANNELS)] for weight in weights]
        rank = recipe.rank if recipe.smooth == "svdquant" else 0
        rows = seen.sample.rows.to(weights[0].device)
        low_rank = (lambda smoothed: truncated_svd(smoothed, rank)) if rank else None
        self.output = OutputError(rows, some, fake_weight(scheme.weight), None, low_rank, rotation)

    def __call__(self, multiplier: Tensor) -> float:
        # A rotation's range is not known from that of the channels.
        limit = None if self.rotation else float((self.absmax * multiplier).max())
        self.output.fake_quantize_input = fake_input(self.activation, limit)
        return self.output(multiplier)
