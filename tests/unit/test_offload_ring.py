"""The order of copies and computations: nothing is read before it is there, nothing is overwritten while it is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from torch import Tensor

from lightx2v import platform
from lightx2v.features.offload.ring import Ring
from lightx2v.features.offload.store import Wait
from lightx2v.platform import CopyQueue, DeviceInfo

DEVICE = DeviceInfo("xpu", 0, "fake", None, 0, 0)


class Event:
    reached = False


class Stream:
    """Work that is queued and done later."""

    def __init__(self) -> None:
        self.work: list[tuple[Event | None, Callable[[], None]]] = []

    def wait_event(self, event: Event) -> None:
        self.work.append((event, lambda: None))

    def record_event(self) -> Event:
        event = Event()
        self.work.append((None, lambda: setattr(event, "reached", True)))
        return event


class Backend:
    """Streams like those of an accelerator, whose work `finish` does in any order that their events allow."""

    def __init__(self) -> None:
        self.main = Stream()
        self.streams = [self.main]
        self.current = self.main

    def Stream(self, device: int) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, index: int) -> Stream:
        return self.current

    def finish(self, seed: int) -> None:
        chance = random.Random(seed)
        while ready := [s for s in self.streams if s.work and (s.work[0][0] is None or s.work[0][0].reached)]:
            chance.choice(ready).work.pop(0)[1]()
        assert not any(stream.work for stream in self.streams), "streams wait for each other"


class Memory:
    """A slot that holds the number of a unit."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.holds = backend, -1

    def copy_(self, unit: int, non_blocking: bool) -> None:
        assert non_blocking
        # A copy is not done at once: whoever reads in between reads neither the old nor the new.
        self.backend.current.work.append((None, lambda: setattr(self, "holds", -1)))
        self.backend.current.work.append((None, lambda: setattr(self, "holds", unit)))


class Numbers:
    """A store whose units are their own numbers."""

    def __init__(self, queue: CopyQueue) -> None:
        self.queue, self.log, self.closed = queue, list[str](), False
        self.host_bytes = 0

    def start(self, unit: int, target: Tensor, after: Any) -> Wait:
        self.log.append(f"copy {unit}")
        mark = self.queue.copy(target, cast(Tensor, unit), after)
        return lambda: mark

    def close(self) -> None:
        self.closed = True


class Machine:
    """A ring on a fake accelerator. `seen` are pairs (unit wanted, unit read)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, units: int) -> None:
        self.backend = Backend()
        monkeypatch.setattr(platform, "_backend", lambda device: self.backend)
        self.store = Numbers(queue := CopyQueue(DEVICE))
        store, memory = cast(Any, self.store), cast(Any, lambda size: Memory(self.backend))
        self.ring = Ring([1] * units, store, queue, memory)
        self.seen: list[tuple[int, int]] = []

    def use(self, unit: int, ahead: bool = True) -> None:
        _, memory = self.ring.acquire(unit, ahead)
        self.store.log.append(f"compute {unit}")
        self.backend.main.work.append((None, lambda: self.seen.append((unit, cast(Any, memory).holds))))
        self.ring.release(unit)


@pytest.mark.parametrize("units", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_work_reads_its_own_unit_whatever_the_timing(monkeypatch: pytest.MonkeyPatch, units: int, seed: int) -> None:
    machine = Machine(monkeypatch, units)
    machine.ring.open()
    for _ in range(3):
        for unit in range(units):
            machine.use(unit)
    machine.backend.finish(seed)
    assert machine.seen == [(unit, unit) for unit in range(units)] * 3


@pytest.mark.parametrize("seed", range(20))
def test_so_it_does_in_any_order(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    machine, chance = Machine(monkeypatch, 5), random.Random(seed)
    wanted = [chance.randrange(5) for _ in range(60)]
    machine.ring.open()
    for unit in wanted:
        machine.use(unit, ahead=chance.random() < 0.8)
    machine.backend.finish(seed)
    assert machine.seen == [(unit, unit) for unit in wanted]


def test_the_next_copy_is_queued_before_a_unit_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 3)
    machine.ring.open(passes=2)
    for unit in (0, 1, 2, 0, 1, 2):
        machine.use(unit)
    order = "copy 0, copy 1, compute 0, copy 2, compute 1, copy 0, compute 2, copy 1, compute 0, copy 2, compute 1"
    assert machine.store.log == [*order.split(", "), "compute 2"]  # nothing ahead of the end
    assert machine.ring.report.late == 0 and machine.ring.report.units == machine.ring.report.nbytes == 6


def test_a_copy_waits_for_the_work_that_reads_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 3)
    machine.ring.open()
    for unit in range(3):
        machine.use(unit)
    main, side = machine.backend.streams
    while side.work and (side.work[0][0] is None or side.work[0][0].reached):
        side.work.pop(0)[1]()
    main.work.pop(0)[1]()  # the marks at which the slots were new
    main.work.pop(0)[1]()
    while side.work and (side.work[0][0] is None or side.work[0][0].reached):
        side.work.pop(0)[1]()
    assert [cast(Any, slot.memory).holds for slot in machine.ring._slots] == [0, 1]  # 2 waits for the work on 0


def test_a_part_of_the_units_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 6)
    machine.ring.open()
    for _ in range(3):
        for unit in (0, 1, 5):  # the first two and the last
            machine.use(unit)
    machine.backend.finish(0)
    assert machine.seen == [(unit, unit) for unit in (0, 1, 5)] * 3
    assert machine.ring.report.late == 1  # the first time


def test_units_that_are_not_used_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 4)
    machine.ring.open(passes=0)
    assert machine.store.log == []
    machine.ring.open(passes=1)
    for unit in range(4):
        machine.use(unit)
    assert machine.ring.report.units == 4


def test_a_slot_is_not_filled_while_threads_still_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With units from disk, of which the one that was read ahead is not the one that comes."""
    filling: dict[int, int] = {}

    class Disk(Numbers):
        def start(self, unit: int, target: Tensor, after: Any) -> Wait:
            assert id(target) not in filling
            filling[id(target)] = unit
            return lambda: filling.pop(id(target), None) and None

    machine = Machine(monkeypatch, 5)
    ring = Ring([1] * 5, cast(Any, Disk(CopyQueue(DEVICE))), CopyQueue(DEVICE), cast(Any, lambda size: Memory(None)))
    machine.ring = ring
    ring.open()
    for unit in (0, 3, 1, 4, 4, 2, 0):
        machine.use(unit)


def test_what_is_used_twice_at_once_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 3)
    machine.ring.open()
    machine.ring.acquire(0)
    machine.ring.acquire(1)
    with pytest.raises(RuntimeError, match="at once"):
        machine.ring.acquire(2)
    machine.ring.release(0)
    machine.use(2)
    machine.ring.close()
    assert machine.store.closed
