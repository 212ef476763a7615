"""CFG gating: late in a request, classifier-free guidance keeps the difference of its branches, and runs one of them.

Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487), in FastVideo's simplest form: after a share of the steps the
unconditional prediction is the conditional one less what their difference was at the last step that computed both. As
in FasterCache (Lv et al. 2024, arXiv 2410.19355) both may be computed again every few steps; then the difference is
extrapolated at first order between them, which without new values goes astray.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.features.cache.report import Cache, CacheReport
from lightx2v.features.cache.series import Series
from lightx2v.features.cache.stack import PerBranch, first_forwards
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import Branch


class CfgGate:
    """`share` of the steps, at the start, compute both branches, and after them every `interval`-th, if that is given;
    `cache` works on the forwards that remain."""

    def __init__(self, share: float, cache: Cache | None = None, interval: int | None = None) -> None:
        self.share, self.cache, self.interval = share, cache, interval
        self.method = "cfg_gate" if cache is None else f"{cache.method} + cfg_gate"
        self._report = CacheReport(self.method)

    @property
    def report(self) -> CacheReport:
        return self._report if self.cache is None else self.cache.report

    @property
    def first_blocks(self) -> int:
        """Blocks at the front that every forward computes, where `cache` has such."""
        return getattr(self.cache, "first_blocks", 0)

    def kept_streams(self, blocks: int) -> float:
        return 0.0 if self.cache is None else self.cache.kept_streams(blocks)

    def gated(self, run: RunInfo) -> set[tuple[int, Branch]]:
        """The forwards that are left out. The first unconditional one at a size of the latents is not."""
        open_steps = math.ceil(self.share * run.steps)
        first = first_forwards(run)
        return {
            (step, branch)
            for step, branch in run.runs()
            if branch == "uncond"
            and step >= open_steps
            and (step, branch) not in first
            and (self.interval is None or (step - open_steps + 1) % self.interval)
        }

    def schedule(self, run: RunInfo) -> Schedule | None:
        planned = dict.fromkeys(run.runs(), True) if self.cache is None else self.cache.schedule(run)
        return None if planned is None else {**planned, **dict.fromkeys(self.gated(run), False)}

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        return inner if self.cache is None else self.cache.begin(run, inner)

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        self._report = CacheReport(self.method)
        gated = self.gated(run)
        compute = predict if self.cache is None else self.cache.around(run, predict)
        held: dict[str, Tensor] = {}
        store, order = Store(Holding(), CacheReport(self.method)), 0 if self.interval is None else 1
        differences = PerBranch(run, lambda branch: Series(store, branch, order))

        def forward(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
            if (step, branch) in gated:
                self.report.count(branch, False)
                return held["cond"] - differences.of(branch, step).at(step)[0]
            if self.cache is None:
                self.report.count(branch, True)
            out = compute(latents, timestep, step, branch)
            if branch == "cond":
                held["cond"] = out
            else:
                differences.of(branch, step).update(step, (held["cond"] - out, None))
            return out

        return forward
