"""TaylorSeer (Liu et al. 2025, arXiv 2503.06923) on what the whole stack adds: computed every few steps, else foretold.

The original keeps a series for each module, which for Wan 14B is 80 GB a branch; one for the stack is order + 1
streams.
"""

from __future__ import annotations

from lightx2v.features.base import RunInfo, Schedule
from lightx2v.features.cache.stack import StackCache, first_forwards
from lightx2v.features.cache.store import Holding

INTERVAL, ORDER, WARMUP = 4, 1, 1


class TaylorSeer(StackCache):
    """Computes the first `warmup` steps, and from the last of them on every `interval`-th."""

    method = "taylorseer"

    def __init__(self, holding: Holding, interval: int = INTERVAL, order: int = ORDER, warmup: int = WARMUP) -> None:
        super().__init__(holding, order)
        self.interval, self.warmup = interval, max(warmup, 1)

    def schedule(self, run: RunInfo) -> Schedule:
        first = first_forwards(run)
        return {(step, branch): self._computes(step) or (step, branch) in first for step, branch in run.runs()}

    def _computes(self, step: int) -> bool:
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0
