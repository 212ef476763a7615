"""Wall-clock seconds of several ways to do the same work, taken in turns: A B C A B C ...

What disturbs a machine for a while (a neighbour, a clock that sinks) then falls on all of them and not on one.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from loguru import logger
from torch import Tensor

from lightx2v import platform
from lightx2v.errors import ConfigError, LightX2VError, UserError
from lightx2v.platform import DeviceInfo

Kind = Literal["lightx2v", "peer", "baseline"]
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Staged:
    """What one call of a work with stages gives: the seconds of each, and the result."""

    stages: Mapping[str, float]
    result: Tensor


Work = Callable[[], Tensor | Staged]
"""One call of the work."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to do the work: `build` makes the callable and what there is to say about it."""

    name: str
    kind: Kind
    build: Callable[[], tuple[Work, Facts]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate that ran. `seconds` has the wall-clock seconds of one call, for each repeat."""

    name: str
    kind: Kind
    seconds: tuple[float, ...]
    calls: int
    """How many calls each of `seconds` is the mean of."""
    facts: Facts = field(default_factory=dict)
    stages: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Seconds of each stage, for each repeat, where the work has stages."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A candidate that could not run, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one case: the entries, the names in the order in which they were timed, and who did not run."""

    entries: tuple[Entry, ...]
    order: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """How to measure: `repeats` samples of each after `warmup` calls (both at least 1).

    A sample is the mean of as many calls as take `sample_seconds` together, of one call where that is 0.
    """

    repeats: int
    warmup: int = 1
    sample_seconds: float = 0.0


@dataclass(slots=True)
class _Ready:
    candidate: Candidate
    work: Work
    facts: Facts
    calls: int


@torch.inference_mode()
def measure(candidates: Sequence[Candidate], device: DeviceInfo, timing: Timing) -> Measured:
    """Build and warm up each candidate, then time them in turns.

    The first that runs is the reference: each entry's facts get `error`, the distance of its result from the
    reference's over the length of that. A peer that fails is skipped with the reason, and so is a candidate of the
    engine that this device or torch.compile does not take; any other failure is raised. ConfigError when none is left.
    """
    ready: list[_Ready] = []
    skipped: list[Skipped] = []
    reference: Tensor | None = None
    for candidate in candidates:
        began = time.perf_counter()
        try:
            prepared, result = _prepare(candidate, device, timing)
        except Exception as failure:
            if candidate.kind != "peer" and not _expected(failure):
                raise
            skipped.append(Skipped(candidate.name, _reason(failure)))
            logger.info("{} is left out: {}", candidate.name, skipped[-1].reason)
            gc.collect()
            platform.empty_cache(device)
            continue
        logger.debug("{} is built and warm after {:.1f} s", candidate.name, time.perf_counter() - began)
        reference = result if reference is None else reference
        prepared.facts = {**prepared.facts, "error": relative_error(result, reference)}
        ready.append(prepared)
    if not ready:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in skipped)
        raise ConfigError("bench", f"nothing is left to measure: {reasons}", do="see lightx2v doctor")
    return _take_turns(ready, tuple(skipped), device, timing.repeats)


def _prepare(candidate: Candidate, device: DeviceInfo, timing: Timing) -> tuple[_Ready, Tensor]:
    work, facts = candidate.build()
    outcome = work()
    for _ in range(timing.warmup - 1):
        outcome = work()
    calls = 1
    if timing.sample_seconds:
        calls = min(1000, math.ceil(timing.sample_seconds / _one_call(work, device, timing.sample_seconds)))
    platform.synchronize(device)
    return _Ready(candidate, work, facts, calls), outcome.result if isinstance(outcome, Staged) else outcome


def _one_call(work: Work, device: DeviceInfo, enough: float) -> float:
    """Seconds of the shortest of a few calls: a single one may be disturbed. Stops when `enough` has passed twice."""
    shortest, spent = math.inf, 0.0
    while spent < 2 * enough:
        taken = max(_seconds(work, device, 1)[0], 1e-6)
        shortest, spent = min(shortest, taken), spent + taken
    return shortest


def _take_turns(ready: Sequence[_Ready], skipped: tuple[Skipped, ...], device: DeviceInfo, repeats: int) -> Measured:
    seconds: dict[str, list[float]] = {one.candidate.name: [] for one in ready}
    stages: dict[str, dict[str, list[float]]] = {name: {} for name in seconds}
    order: list[str] = []
    for _ in range(repeats):
        for one in ready:
            name = one.candidate.name
            taken, outcome = _seconds(one.work, device, one.calls)
            seconds[name].append(taken / one.calls)
            order.append(name)
            if isinstance(outcome, Staged):
                for stage, value in outcome.stages.items():
                    stages[name].setdefault(stage, []).append(value)
    entries = tuple(
        Entry(
            one.candidate.name,
            one.candidate.kind,
            tuple(seconds[one.candidate.name]),
            one.calls,
            one.facts,
            {stage: tuple(values) for stage, values in stages[one.candidate.name].items()},
        )
        for one in ready
    )
    return Measured(entries, tuple(order), skipped)


def _seconds(work: Work, device: DeviceInfo, calls: int) -> tuple[float, Tensor | Staged]:
    """Seconds of `calls` calls together, the device's queue drained before and after, and what the last returned."""
    platform.synchronize(device)
    began = time.perf_counter()
    outcome = work()
    for _ in range(calls - 1):
        outcome = work()
    platform.synchronize(device)
    return time.perf_counter() - began, outcome


def relative_error(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference| in the Euclidean norm, computed in float32."""
    length = reference.float().norm()
    return float((result.float() - reference.float()).norm() / length) if length else math.inf


def _expected(failure: Exception) -> bool:
    """Whether a candidate of the engine may fail so: refused by its plan or its layers, or by torch.compile."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    return isinstance(failure, (UserError, TorchDynamoException))


def _reason(failure: Exception) -> str:
    """The first line of an exception's message, with its type where that says more than the message."""
    line = (str(failure).strip().splitlines() or ["no message"])[0]
    return line if isinstance(failure, LightX2VError) else f"{type(failure).__name__}: {line}"


def allow_many_compilations() -> None:
    """Lift torch.compile's limit on variants of one function: here every candidate is one of the same code."""
    import torch._dynamo

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, 10_000)
