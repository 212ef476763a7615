"""TaylorSeer (Liu et al. 2025, arXiv 2503.06923) on what the whole stack adds: computed every few steps, else foretold.

The original keeps a series for each module, which for Wan 14B is 80 GB a branch; one for the stack is order + 1
streams. The lite form, diffusers' name for it, extrapolates what the whole forward gives, and keeps latents alone.
"""

from __future__ import annotations

from torch import Tensor

from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.series import Series
from lightx2v.features.cache.stack import PerBranch, StackCache, first_forwards
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import Branch

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


class TaylorSeerLite(TaylorSeer):
    """The same, of the velocity: a forward that is left out reads neither patches nor head."""

    def kept_streams(self, blocks: int) -> float:
        return 0.0  # latents are small beside the stream

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        return inner

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        self.report = report = CacheReport(self.method)
        planned, store = self.schedule(run), Store(self.holding, report)
        states = PerBranch(run, lambda branch: Series(store, branch, self.order))

        def forward(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
            series, computed = states.of(branch, step), planned[step, branch]
            report.count(branch, computed)
            if not computed:
                return series.at(step)[0]
            out = predict(latents, timestep, step, branch)
            series.update(step, (out, None))
            return out

        return forward
