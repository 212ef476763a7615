"""AdaCache (Kahatapitiya et al. 2024, arXiv 2411.02397): each computed step says how many follow that are not.

What a block in the middle of the stack adds is compared with that of the computed step before: its relative L1 change,
divided by the steps between them, is looked up in a codebook. The first step and the last two are always computed.

The first branch of guidance decides for both; with `separate` each has its own decisions, as published.

With `motion` the change is scaled up where the frames differ much from each other: by ((m / 0.385)^8 + 10 |its change a
step|), m being the L1 difference of neighbouring frames over the sum of their norms, from 10 to 90 % of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightx2v.features.base import RunInfo, Stack
from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.series import Series, added, residual
from lightx2v.features.cache.stack import PerBranch, StackCache, Together, relative_change, run_part
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import Branch, DiT, StepContext, Stream

Codebook = tuple[tuple[float, int], ...]
"""Changes in rising order, and up to each of them the steps to the next computed one; the last has no upper bound."""

FOR_100_STEPS: Codebook = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))
FOR_30_STEPS: Codebook = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1))
MANY_STEPS = 65
"""From so many steps on the codebook for 100 steps is the nearer one."""


class AdaCache(StackCache):
    """`codebook` None takes the published one for the number of steps."""

    method = "adacache"

    def __init__(
        self, holding: Holding, codebook: Codebook | None = None, motion: bool = False, separate: bool = False
    ) -> None:
        super().__init__(holding)
        self.codebook, self.motion, self.separate = codebook, motion, separate

    def kept_streams(self, blocks: int) -> float:
        return super().kept_streams(blocks) + 1

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        self.report = report = CacheReport(self.method)
        store = Store(self.holding, report)
        codebook = self.codebook or (FOR_100_STEPS if run.steps >= MANY_STEPS else FOR_30_STEPS)
        states = PerBranch(run, lambda branch: _State(store, branch, codebook, self.motion, run.steps))
        together = Together(self.separate)

        def stack(model: DiT, stream: Stream, context: StepContext) -> Stream:
            blocks, step = len(model.blocks), context.step
            state, middle = states.of(context.branch, step), blocks // 2
            computed = together.computes(step, state.series, lambda: state.due(step))
            report.count(context.branch, computed)
            if not computed:
                return added(stream, state.series.at(step))
            before = run_part(inner, model, stream, context, 0, middle)
            after = run_part(inner, model, before, context, middle, middle + 1)
            if together.leads(state.series):
                state.measure(step, after.x - before.x, context.grid[0])
            out = run_part(inner, model, after, context, middle + 1, blocks)
            state.series.update(step, residual(out, stream))
            return out

        return stack


class _State:
    """One branch: the next step to compute, and what the middle block has added at the last one."""

    def __init__(self, store: Store, branch: Branch, codebook: Codebook, motion: bool, steps: int) -> None:
        self.series = Series(store, branch)
        self._store, self._key = store, (branch, "middle block")
        self._codebook, self._motion, self._steps = codebook, motion, steps
        self._next, self._length, self._motion_before = 0, 1, 1.0
        self._measured = False

    def due(self, step: int) -> bool:
        return step >= min(self._next, self._steps - 2) or self.series.empty

    def measure(self, step: int, added: Tensor, frames: int) -> None:
        """Decide how many steps follow; waits for the device where any can be left out."""
        if step + 1 >= self._steps - 2:
            return  # all that follow are computed
        if self._measured:
            change = relative_change(added, self._store.get(self._key))
            still = added.new_ones((), dtype=torch.float32)
            moving = _frame_difference(added, frames) if self._motion and frames > 1 else still
            rate, motion = torch.stack([change, moving]).tolist()
            rate /= self._length
            if self._motion and frames > 1:
                rate *= self._motion_factor(step, motion)
            self._length = _look_up(self._codebook, rate)
        self._next = step + self._length
        self._store.put(self._key, added, measured=True)
        self._measured = True

    def _motion_factor(self, step: int, difference: float) -> float:
        inside = 0.1 * self._steps <= step <= 0.9 * self._steps
        motion = (difference / 0.385) ** 8 if inside else 1.0
        gradient = 10 * (motion - self._motion_before) / self._length
        self._motion_before = motion
        return motion + abs(gradient)


def _look_up(codebook: Sequence[tuple[float, int]], rate: float) -> int:
    return next((length for bound, length in codebook[:-1] if rate < bound), codebook[-1][1])


def _frame_difference(added: Tensor, frames: int) -> Tensor:
    """L1 difference of neighbouring frames over the sum of their norms; added [B, L, D], L frame after frame."""
    video = added.float().unflatten(1, (frames, -1))
    later, earlier = video[:, 1:], video[:, :-1]
    return (later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum())
