"""EasyCache (Zhou et al. 2025, arXiv 2507.02860): whole forwards are left out, with the patches and the head.

The rate k at which the output follows the input is measured at computed steps; k times the change of the latents since
the step before, relative to the output, is summed up until it reaches a threshold. A forward that is left out gives its
latents plus the difference of output and latents at the last computed step. The conditional branch decides for both.
"""

from __future__ import annotations

from torch import Tensor

from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.stack import PerBranch
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import Branch

THRESHOLD, WARMUP = 0.05, 10


class EasyCache:
    """Computes the first `warmup` steps and the last one."""

    method = "easycache"

    def __init__(self, threshold: float = THRESHOLD, warmup: int = WARMUP) -> None:
        self.threshold, self.warmup = threshold, warmup
        self.report = CacheReport(self.method)

    def kept_streams(self, blocks: int) -> float:
        return 0.0  # latents are small beside the stream

    def schedule(self, run: RunInfo) -> Schedule | None:
        return None

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        return inner

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        self.report = report = CacheReport(self.method)
        decisions = PerBranch(run, lambda branch: _Decisions(self.threshold, self.warmup, run.steps - 1))
        stores = PerBranch(run, lambda branch: Store(Holding(), report))
        leading = run.branches[0]

        def forward(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
            decision = decisions.of(leading, step)
            store = stores.of(branch, step)
            if branch == leading:
                decision.ask(step, latents)
            computed = decision.computing or branch not in store
            report.count(branch, computed)
            if not computed:
                kept: Tensor = store.get(branch)
                return latents + kept
            out = predict(latents, timestep, step, branch)
            store.put(branch, out - latents)
            if branch == leading:
                decision.learn(latents, out)
            return out

        return forward


class _Decisions:
    """The pair of branches. All but one number a step stays on the device."""

    def __init__(self, threshold: float, warmup: int, last: int) -> None:
        self._threshold, self._warmup, self._last = threshold, warmup, last
        self._before: Tensor | None = None
        self._computed: tuple[Tensor, Tensor] | None = None
        self._rate: Tensor | None = None
        self._sum = 0.0
        self.computing = True

    def ask(self, step: int, latents: Tensor) -> None:
        """Decide about `step`."""
        before, self._before = self._before, latents
        self.computing = True
        known = before is not None and self._computed is not None and self._rate is not None
        if known and self._warmup <= step < self._last and self._threshold > 0:
            assert before is not None and self._computed is not None and self._rate is not None
            size = self._computed[1].abs().mean()
            self._sum += float(self._rate * (latents - before).abs().mean() / size)
            self.computing = self._sum >= self._threshold
        if self.computing:
            self._sum = 0.0

    def learn(self, latents: Tensor, out: Tensor) -> None:
        """Measure how the output follows the input between the last two computed steps."""
        if self._computed is not None:
            latents_before, out_before = self._computed
            self._rate = (out - out_before).abs().mean() / (latents - latents_before).abs().mean()
        self._computed = latents, out
