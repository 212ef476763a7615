"""DBCache (cache-dit, DefTruth et al. 2025): the first blocks tell whether those in the middle are computed.

The first blocks are always computed. Where what they add has changed by less than a threshold since the last step that
was computed in full, what the middle blocks added then is added again. The last blocks are always computed, too.

The first branch of guidance decides for both, which cache-dit has as an option; its default, and FBCache, let each
branch go by its own change, `separate` here.
"""

from __future__ import annotations

from torch import Tensor

from lightx2v.features.base import RunInfo, Stack
from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.series import Series, added, residual
from lightx2v.features.cache.stack import PerBranch, StackCache, Together, relative_change, run_part
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import Branch, DiT, StepContext, Stream

THRESHOLD, FIRST_BLOCKS, LAST_BLOCKS, WARMUP = 0.08, 8, 0, 8


class DBCache(StackCache):
    """`max_cached` and `max_continuous` bound the steps that are recalled, in all and in a row."""

    method = "dbcache"

    def __init__(
        self,
        holding: Holding,
        threshold: float = THRESHOLD,
        first_blocks: int = FIRST_BLOCKS,
        last_blocks: int = LAST_BLOCKS,
        warmup: int = WARMUP,
        max_cached: int | None = None,
        max_continuous: int | None = None,
        order: int = 0,
        separate: bool = False,
    ) -> None:
        super().__init__(holding, order)
        self.threshold, self.warmup = threshold, warmup
        self.first_blocks, self.last_blocks = first_blocks, last_blocks
        self.max_cached, self.max_continuous = max_cached, max_continuous
        self.separate = separate

    def kept_streams(self, blocks: int) -> float:
        return super().kept_streams(blocks) + 1

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        self.report = report = CacheReport(self.method)
        store = Store(self.holding, report)
        states = PerBranch(run, lambda branch: _State(self, store, branch))
        together = Together(self.separate)

        def stack(model: DiT, stream: Stream, context: StepContext) -> Stream:
            blocks, step = len(model.blocks), context.step
            middle, last = self.first_blocks, blocks - self.last_blocks
            state = states.of(context.branch, step)
            front = run_part(inner, model, stream, context, 0, middle)
            change = front.x - stream.x
            computed = together.computes(step, state.series, lambda: state.computes(step, change))
            report.count(context.branch, computed)
            if computed:
                out = run_part(inner, model, front, context, middle, last)
                state.series.update(step, residual(out, front))
            else:
                out = added(front, state.series.at(step))
            return run_part(inner, model, out, context, last, blocks)

        return stack


class _State:
    """One branch: what its first blocks added at the last computed step, and how often it was recalled."""

    def __init__(self, cache: DBCache, store: Store, branch: Branch) -> None:
        self.series = Series(store, branch, cache.order)
        self._cache, self._store, self._key = cache, store, (branch, "first blocks")
        self._cached = self._continuous = 0
        self._measured = False

    def computes(self, step: int, front: Tensor) -> bool:
        """Whether the middle blocks are computed. Waits for the device, unless the answer is yes anyway."""
        if self._may_recall(step):
            before = self._store.get(self._key)
            if float(relative_change(front, before)) < self._cache.threshold:
                self._cached, self._continuous = self._cached + 1, self._continuous + 1
                return False
        self._continuous = 0
        self._store.put(self._key, front, measured=True)
        self._measured = True
        return True

    def _may_recall(self, step: int) -> bool:
        cache = self._cache
        return (
            self._measured
            and step >= cache.warmup
            and cache.threshold > 0
            and (cache.max_cached is None or self._cached < cache.max_cached)
            and (cache.max_continuous is None or self._continuous < cache.max_continuous)
        )
