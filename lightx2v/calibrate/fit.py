"""From recorded requests to TeaCache's polynomials and MagCache's ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightx2v.calibrate.recorder import Track
from lightx2v.errors import ConfigError
from lightx2v.features.cache.teacache import RET_STEPS, Decisions, always_computed
from lightx2v.models.base import Branch

DEGREE = 4
"""Of TeaCache's polynomials, as its authors fit them."""
THRESHOLDS = tuple(0.001 * 1.05**power for power in range(156))
"""From 0.001 to 2."""
MIN_STEPS = RET_STEPS + DEGREE + 1
"""A request of so many steps has just enough changes that TeaCache decides by."""


@dataclass(frozen=True)
class Fit:
    """A polynomial, the coefficient of the highest degree first."""

    coefficients: tuple[float, ...]
    error: float
    """Root mean square of its error over that of the changes that it stands for."""
    changes: tuple[float, ...]
    """Of the signal, at every step from the second on: medians of all branches and requests."""
    always: frozenset[int]
    """Steps that TeaCache computes whatever the signal does."""

    def computed(self, threshold: float) -> int:
        """How many of the steps TeaCache would compute."""
        decisions = Decisions(self.coefficients, threshold, ())
        inside = [None if step in self.always else change for step, change in enumerate(self.changes, 1)]
        return 1 + sum(decisions.after(change) for change in inside)

    def threshold(self, share: float) -> float:
        """The smallest threshold, in steps of 5 %, by which it computes at most this share of the steps, if it can."""
        allowed = share * (len(self.changes) + 1)
        return next((t for t in THRESHOLDS if self.computed(t) <= allowed), THRESHOLDS[-1])


def fit_signal(tracks: Sequence[dict[Branch, Track]], name: str) -> Fit | None:
    """Least squares: the change of the output as a polynomial of that of the signal. None without such a signal.

    Only the steps that TeaCache decides about count, and of each the median of all branches and requests: at the first
    ones a few change very much.
    """
    every = [track for request in tracks for track in request.values() if name in track.signals]
    if not every:
        return None
    changes, outputs = (
        np.median(np.array(values, dtype=np.float64), axis=0)
        for values in ([track.signals[name] for track in every], [track.outputs for track in every])
    )
    always = frozenset(always_computed(name == "blocks", len(changes) + 1))
    decided = [step - 1 for step in range(1, len(changes) + 1) if step not in always]
    x, y = changes[decided], outputs[decided]
    coefficients = np.polyfit(x, y, DEGREE)
    error = np.sqrt(np.mean((np.polyval(coefficients, x) - y) ** 2) / np.mean(y**2))
    return Fit(tuple(float(c) for c in coefficients), float(error), tuple(changes.tolist()), always)


def mean_ratios(tracks: Sequence[dict[Branch, Track]]) -> dict[Branch, tuple[float, ...]]:
    """MagCache's ratios: for each branch one a step, the first 1, the others means over the requests."""
    branches = tracks[0].keys()
    return {
        branch: (1.0, *np.mean([request[branch].ratios for request in tracks], axis=0).tolist()) for branch in branches
    }


def check_steps(steps: int) -> None:
    """Raise ConfigError where a request has too few steps for a fit."""
    if steps < MIN_STEPS:
        raise ConfigError(
            "sampling.steps", f"{steps} steps say too little to measure a cache", allowed=f"{MIN_STEPS} or more"
        )
