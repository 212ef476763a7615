"""What the methods share that leave out the stack of blocks: state of each branch, the residual, counting.

A forward that is left out gives its input plus what the stack has added at an earlier step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import Tensor

from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.series import Series, added, residual
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import AttentionPart, Branch, DiT, StepContext, Stream

Decide = Callable[[DiT, Stream, StepContext], bool]
"""Whether a forward is computed. Asked once for each, in order, before it."""

T = TypeVar("T")


def stretch(run: RunInfo, step: int) -> int:
    """Number of the stretch of steps that `step` is in; a stretch ends where the latents change their shape."""
    return bisect_right(run.restarts, step)


def first_forwards(run: RunInfo) -> set[tuple[int, Branch]]:
    """Those that have nothing to reuse: the first of each branch, and of each branch after a change of shape."""
    found: dict[tuple[int, Branch], tuple[int, Branch]] = {}
    for step, branch in run.runs():
        found.setdefault((stretch(run, step), branch), (step, branch))
    return set(found.values())


class PerBranch(Generic[T]):
    """A state for each branch of one request, made anew at its start and where the latents change their shape."""

    def __init__(self, run: RunInfo, make: Callable[[Branch], T]) -> None:
        self._run, self._make = run, make
        self._states: dict[Branch, tuple[int, T]] = {}

    def of(self, branch: Branch, step: int) -> T:
        number = stretch(self._run, step)
        if branch not in self._states or self._states[branch][0] != number:
            self._states[branch] = number, self._make(branch)
        return self._states[branch][1]


class Together:
    """One decision a step for all branches: that of the first; with `separate` each branch has its own.

    Guidance weighs the branches with opposite signs, and so amplifies what their errors do not have in common. Branches
    that reuse what one and the same step has computed have most of it in common. A branch that did not run at that step
    reuses nothing older.
    """

    def __init__(self, separate: bool = False) -> None:
        self._separate = separate
        self._step: int | None = None
        self._first: Series | None = None
        self._computed = True

    def computes(self, step: int, series: Series, decide: Callable[[], bool]) -> bool:
        """Whether the branch of `series` is computed; `decide` is asked for the first branch of a step."""
        if self._separate or step != self._step:
            self._step, self._first, self._computed = step, series, decide()
            return self._computed
        return self._computed or self._first is None or _latest(series) < _latest(self._first)

    def leads(self, series: Series) -> bool:
        """Whether the branch of `series` has decided about the latest step."""
        return self._first is series


def _latest(series: Series) -> int:
    return -1 if series.last is None else series.last


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """mean |new - old| / mean |old|, a float32 scalar on the device."""
    new, old = new.float(), old.float()
    return (new - old).abs().mean() / old.abs().mean()


class StackCache:
    """Base of the methods that leave out whole stacks. A method says which forwards are computed.

    `order` is that of the Taylor series by which the residual is extrapolated; 0 reuses it as it is.
    """

    method: ClassVar[str]

    def __init__(self, holding: Holding, order: int = 0) -> None:
        self.holding, self.order = holding, order
        self.report = CacheReport(self.method)

    def schedule(self, run: RunInfo) -> Schedule | None:
        """Which forwards are computed, where that is known ahead."""
        return None

    def decider(self, run: RunInfo) -> Decide:
        """The decision for one request: by the schedule, unless the method looks at the data."""
        planned = self.schedule(run)
        assert planned is not None
        return lambda model, stream, context: planned[context.step, context.branch]

    def kept_streams(self, blocks: int) -> float:
        """How many tensors of the size of the stream are kept for each branch."""
        return self.order + 1

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        self.report = report = CacheReport(self.method)
        store = Store(self.holding, report)
        decide = self.decider(run)
        states = PerBranch(run, lambda branch: Series(store, branch, self.order))

        def stack(model: DiT, stream: Stream, context: StepContext) -> Stream:
            series = states.of(context.branch, context.step)
            computed = decide(model, stream, context) or series.empty
            report.count(context.branch, computed)
            if not computed:
                return added(stream, series.at(context.step))
            out = inner(model, stream, context)
            series.update(context.step, residual(out, stream))
            return out

        return stack

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        return predict


class Part:
    """Some of the blocks of a model, as a model."""

    def __init__(self, model: DiT, start: int, stop: int) -> None:
        self._model = model
        self.blocks = list(model.blocks)[start:stop]
        self._layers = range(start, start + len(self.blocks))

    def attention_parts(self) -> list[AttentionPart]:
        return [part for part in self._model.attention_parts() if part.layer in self._layers]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def run_part(inner: Stack, model: DiT, stream: Stream, context: StepContext, start: int, stop: int) -> Stream:
    """Blocks `start` to `stop` by `inner`."""
    return inner(cast(DiT, Part(model, start, stop)), stream, context) if start < stop else stream
