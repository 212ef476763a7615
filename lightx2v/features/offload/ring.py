"""A few slots through which units pass, one ahead of its use.

While unit i computes, i + 1 is copied; its slot is that of i - 1, and the copy begins when the device has finished with
that. The device orders this itself by marks (events), so the host queues unit after unit without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.features.offload.store import Store, Wait
from lightx2v.platform import CopyQueue

_START = -1
"""Before the first unit."""


@dataclass
class Report:
    """What has moved since the model was loaded."""

    units: int = 0
    nbytes: int = 0
    late: int = 0
    """Units that were asked for before their copy was begun."""


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    unit: int | None = None
    arriving: Wait | None = None
    free: Any = None
    """The mark after the last work that read it."""
    users: int = 0
    last_used: int = 0


class Ring:
    """Slots for units that are used in the order 0, 1, ... and again from the start, or as they were the last time.

    Any other order works, with waits.
    """

    def __init__(
        self, sizes: Sequence[int], store: Store, queue: CopyQueue, allocate: Callable[[int], Tensor], slots: int = 2
    ) -> None:
        self.report = Report()
        self._sizes, self._store, self._queue, self._allocate = sizes, store, queue, allocate
        self._count = min(slots, len(sizes))
        self._slots: list[_Slot] = []
        self._clock = 0
        self._passes: int | None = None
        self._at = _START
        self._following: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the slots while they are there."""
        return self._count * max(self._sizes, default=0)

    def open(self, passes: int | None = None) -> None:
        """Make the slots and begin with the first unit. `passes`: how often the units will be gone through, if known.

        Nothing is brought in ahead beyond the last of them.
        """
        self._passes, self._at = passes, _START
        self._slots = [_Slot(self._allocate(max(self._sizes)), free=self._queue.mark()) for _ in range(self._count)]
        if passes != 0:
            self._ahead(_START)

    def acquire(self, unit: int, ahead: bool = True) -> tuple[int, Tensor]:
        """The number and memory of the slot that holds `unit`, for work queued from now on; then begin with the next.

        Raises what reading the unit raised.
        """
        if not self._slots:
            self.open()
        slot = self._slot_of(unit)
        if slot is None:
            self.report.late += 1
            slot = self._idle()
            if slot is None:
                raise RuntimeError("more units are used at once than there are slots")
            self._load(unit, slot)
        if slot.arriving is not None:
            arriving, slot.arriving, slot.unit = slot.arriving, None, None
            self._queue.wait(arriving())
            slot.unit = unit
        slot.users += 1
        self._clock += 1
        slot.last_used = self._clock
        if ahead and unit != self._at:
            if unit == self._first and self._passes is not None:
                self._passes -= 1
            self._following[self._at], self._at = unit, unit
            self._ahead(unit)
        return self._slots.index(slot), slot.memory

    def release(self, unit: int) -> None:
        """The work that needs `unit` is queued."""
        slot = self._slot_of(unit)
        assert slot is not None
        slot.users -= 1
        slot.free = self._queue.mark()

    def close(self) -> None:
        """Give up the slots, once nothing is on its way to them."""
        for slot in self._slots:
            if slot.arriving is not None:
                with suppress(LightX2VError):  # nobody asked for it
                    self._queue.wait_here(slot.arriving())
        self._store.close()
        self._slots = []

    @property
    def _first(self) -> int:
        return self._following.get(_START, 0)

    def _slot_of(self, unit: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.unit == unit), None)

    def _idle(self, keep: int | None = None) -> _Slot | None:
        """The slot that nobody uses for the longest time, but not that of the unit `keep`."""
        idle = [slot for slot in self._slots if not slot.users and (keep is None or slot.unit != keep)]
        return min(idle, key=lambda slot: slot.last_used, default=None)

    def _ahead(self, unit: int) -> None:
        following = self._following.get(unit, (unit + 1) % len(self._sizes))
        if self._slot_of(following) is not None or (following == self._first and self._passes == 0):
            return
        slot = self._idle(keep=unit)
        if slot is not None:
            self._load(following, slot)

    def _load(self, unit: int, slot: _Slot) -> None:
        if slot.arriving is not None:  # another unit that nobody came for; threads may still be writing it
            slot.arriving()
        slot.unit, slot.arriving = unit, None
        slot.arriving = self._store.start(unit, slot.memory, slot.free)
        self._clock += 1
        slot.last_used = self._clock
        self.report.units += 1
        self.report.nbytes += self._sizes[unit]
