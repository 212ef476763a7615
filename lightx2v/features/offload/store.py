"""Where the slabs of units are kept while they are off the device, and how they come to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lightx2v.features.offload.slab import Slab
from lightx2v.platform import CopyQueue, DeviceInfo, host_memory

Wait = Callable[[], Any]
"""Returns the mark at which the bytes are there, when it is known; it may wait for a disk, never for the device."""


class Store(Protocol):
    """Keeps units, by number from 0 on."""

    @property
    def host_bytes(self) -> int:
        """Host memory that it takes."""
        ...

    def add(self, slab: Slab) -> list[Tensor]:
        """Keep the bound tensors of the next unit. Returns what its modules are to see while it is away."""
        ...

    def start(self, unit: int, target: Tensor, after: Any) -> Wait:
        """Begin to bring a unit's bytes into `target`, which is free once the mark `after` is reached."""
        ...

    def close(self) -> None:
        """Wait for what was begun."""
        ...


class HostStore:
    """One page-locked slab for each unit. Away from the device, modules see their weights in it."""

    def __init__(self, device: DeviceInfo, queue: CopyQueue) -> None:
        self._device, self._queue = device, queue
        self._memory: list[Tensor] = []
        self._last: Any = None

    @property
    def host_bytes(self) -> int:
        return sum(memory.numel() for memory in self._memory)

    def add(self, slab: Slab) -> list[Tensor]:
        memory = host_memory(slab.nbytes, self._device)
        slab.pack(memory)
        self._memory.append(memory)
        return slab.views(memory)

    def start(self, unit: int, target: Tensor, after: Any) -> Wait:
        memory = self._memory[unit]
        self._last = mark = self._queue.copy(target[: memory.numel()], memory, after)
        return lambda: mark

    def close(self) -> None:
        self._queue.wait_here(self._last)  # the memory may be given up next
