"""MagCache (Ma et al. 2025, arXiv 2506.09045): residuals shrink from step to step by ratios that prompts hardly change.

`ratios` are mean(|r_t| / |r_t-1|) over tokens of what the stack adds, from one calibration run. The product of the
ratios since the last computed step says how far the residual kept has come off; its distances from 1 are summed up.

Both branches of guidance go by the mean of their ratios, which differ little, so that they compute at the same steps
(`stack.Together` says why). The original lets each go by its own, `separate` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from lightx2v.features.base import RunInfo, Schedule
from lightx2v.features.cache.stack import PerBranch, StackCache
from lightx2v.features.cache.store import Holding
from lightx2v.models.base import Branch

THRESHOLD, MAX_SKIP, RETENTION = 0.12, 2, 0.2


def nearest(ratios: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` of the ratios, evenly spaced from the first to the last, as MagCache takes them for other step counts."""
    if count == len(ratios):
        return tuple(ratios)
    if count == 1:
        return (ratios[-1],)
    spacing = (len(ratios) - 1) / (count - 1)
    return tuple(ratios[round(index * spacing)] for index in range(count))


class Decisions:
    """Those for one branch, step after step."""

    def __init__(self, ratios: Sequence[float], threshold: float, max_skip: int, first: int) -> None:
        self._ratios, self._threshold, self._max_skip, self._first = ratios, threshold, max_skip, first
        self._reset()
        self._fresh = True

    def computes(self, step: int) -> bool:
        """Whether `step` is computed; the first one asked for is, and all before `first`."""
        fresh, self._fresh = self._fresh, False
        if step >= self._first:
            self._ratio *= self._ratios[step]
            self._error += abs(1 - self._ratio)
            self._skipped += 1
            if not fresh and self._error < self._threshold and self._skipped <= self._max_skip:
                return False
            self._reset()
        return True

    def _reset(self) -> None:
        self._ratio, self._error, self._skipped = 1.0, 0.0, 0


class MagCache(StackCache):
    """`ratios`: one list a branch, as many as the steps of the calibration, the first 1."""

    method = "magcache"

    def __init__(
        self,
        holding: Holding,
        ratios: Mapping[Branch, Sequence[float]],
        threshold: float = THRESHOLD,
        max_skip: int = MAX_SKIP,
        retention: float = RETENTION,
        order: int = 0,
        separate: bool = False,
    ) -> None:
        super().__init__(holding, order)
        self.separate = separate
        self.ratios, self.threshold, self.max_skip, self.retention = ratios, threshold, max_skip, retention

    def schedule(self, run: RunInfo) -> Schedule:
        first = int(run.steps * self.retention)
        lists = {
            branch: nearest(self.ratios[branch], run.steps) for branch in dict.fromkeys(name for _, name in run.runs())
        }
        mean = [fmean(of_step) for of_step in zip(*lists.values(), strict=True)]

        def decisions(branch: Branch) -> Decisions:
            return Decisions(lists[branch] if self.separate else mean, self.threshold, self.max_skip, first)

        states = PerBranch(run, decisions)
        return {(step, branch): states.of(branch, step).computes(step) for step, branch in run.runs()}
