"""TeaCache (Liu et al. 2024, arXiv 2411.19108): the change of a signal foretells the change of the output.

The signal is what modulates the first block's input. Its relative L1 change from step to step is rescaled by a
polynomial that was fitted for the model, and summed up until the sum reaches a threshold; then the blocks are computed.

Where the signal depends on the timestep alone (Wan: the time embedding as the blocks read it with `use_ret_steps`, as
the head reads it without), all decisions are made before the loop, by the same function as at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightx2v.features.base import RunInfo, Schedule
from lightx2v.features.cache.stack import Decide, PerBranch, StackCache, relative_change
from lightx2v.features.cache.store import Holding
from lightx2v.models.base import DiT, StepContext, Stream, TimeEmbedding

THRESHOLD = 0.26
RET_STEPS = 5
"""Steps at the start that are computed with `use_ret_steps`; without, the first and the last one are."""


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Its value at x; the coefficient of the highest degree comes first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


class Decisions:
    """Those for one branch, step after step."""

    def __init__(self, coefficients: Sequence[float], threshold: float, always: Sequence[int]) -> None:
        self._coefficients, self._threshold, self._always = coefficients, threshold, always
        self._before: Tensor | None = None
        self._sum = 0.0

    def computes(self, step: int, signal: Tensor) -> bool:
        """Whether `step` is computed. Waits for the device, unless the answer is yes anyway."""
        before, self._before = self._before, signal
        if before is None or step in self._always or self._threshold <= 0:
            return self.after(None)
        return self.after(float(relative_change(signal, before)))

    def after(self, change: float | None) -> bool:
        """Whether a step is computed whose signal has changed by so much; None: it is always computed."""
        if change is not None:
            self._sum += polynomial(self._coefficients, change)
            if self._sum < self._threshold:
                return False
        self._sum = 0.0
        return True


def always_computed(use_ret_steps: bool, steps: int) -> Sequence[int]:
    """The steps that are computed whatever the signal does."""
    return range(RET_STEPS) if use_ret_steps else (0, steps - 1)


class TeaCache(StackCache):
    """`time_signal`: the model's signal depends on the timestep alone."""

    method = "teacache"

    def __init__(
        self,
        holding: Holding,
        coefficients: Sequence[float],
        threshold: float = THRESHOLD,
        use_ret_steps: bool = False,
        time_signal: bool = False,
        order: int = 0,
    ) -> None:
        super().__init__(holding, order)
        self.coefficients, self.threshold = tuple(coefficients), threshold
        self.use_ret_steps, self.time_signal = use_ret_steps, time_signal

    def schedule(self, run: RunInfo) -> Schedule | None:
        if not self.time_signal:
            return None
        signals, states = self._of_time(run.time).cpu(), self._states(run)
        return {
            (step, branch): states.of(branch, step).computes(step, signals[step : step + 1])
            for step, branch in run.runs()
        }

    def decider(self, run: RunInfo) -> Decide:
        return super().decider(run) if self.time_signal else self.measured(run)

    def measured(self, run: RunInfo) -> Decide:
        """The decision at run time, from the signal of each forward."""
        states = self._states(run)

        def decide(model: DiT, stream: Stream, context: StepContext) -> bool:
            signal = self._of_time(context.time) if model.time_signal else model.signal(stream, context)
            return states.of(context.branch, context.step).computes(context.step, signal)

        return decide

    def _states(self, run: RunInfo) -> PerBranch[Decisions]:
        always = always_computed(self.use_ret_steps, run.steps)
        return PerBranch(run, lambda branch: Decisions(self.coefficients, self.threshold, always))

    def _of_time(self, time: TimeEmbedding) -> Tensor:
        return time.blocks if self.use_ret_steps else time.head
