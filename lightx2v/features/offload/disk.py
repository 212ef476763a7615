"""Units on disk: read from the checkpoint itself where it has the very bytes, else from a temporary file without name.

Threads read into the slot of the unit; for an accelerator, into one of two page-locked buffers, from which it is
copied. Nothing here swallows an error of a thread: whoever waits for the unit gets it.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from lightx2v.errors import CheckpointError, ResourceError
from lightx2v.features.offload.slab import Entry, Slab, flat_bytes
from lightx2v.features.offload.store import Wait
from lightx2v.io.source import FileSpan
from lightx2v.platform import CopyQueue, DeviceInfo, cache_folder, host_memory

Locate = Callable[[Entry], Sequence[FileSpan]]
"""Where in files the bytes of a tensor might lie, one part behind the other; empty where nothing is known."""
CHUNK = 16 * 2**20
"""Bytes that a thread reads at a time, so that all of them read the same unit."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file and their place in a slab."""

    file: int
    """Its descriptor."""
    start: int
    target: int
    nbytes: int


@dataclass
class _Unit:
    nbytes: int
    pieces: list[Piece] = field(default_factory=list)
    memory: Tensor | None = None
    """Of a unit that is kept in host memory after all."""


class DiskStore:
    """Reads units from disk with `workers` threads. Of `keep` bytes, as many units stay in host memory as fit."""

    def __init__(self, device: DeviceInfo, queue: CopyQueue, locate: Locate, workers: int, keep: int = 0) -> None:
        self._device, self._queue, self._locate, self._keep = device, queue, locate, keep
        self._pool = ThreadPoolExecutor(workers, "offload")
        self._staging = None if device.kind == "cpu" else _Staging(device, queue)
        self._units: list[_Unit] = []
        self._files: dict[Path, IO[bytes]] = {}
        self._spill: IO[bytes] | None = None
        self.spilled = 0
        """Bytes that were written because the checkpoint does not have them as they are needed."""

    @property
    def host_bytes(self) -> int:
        kept = sum(unit.memory.numel() for unit in self._units if unit.memory is not None)
        return kept + (self._staging.nbytes if self._staging else 0)

    def add(self, slab: Slab) -> list[Tensor]:
        unit = _Unit(slab.nbytes)
        self._units.append(unit)
        if slab.nbytes <= self._keep:
            self._keep -= slab.nbytes
            unit.memory = host_memory(slab.nbytes, self._device)
            slab.pack(unit.memory)
            return slab.views(unit.memory)
        for entry, tensor in zip(slab.entries, slab.bound, strict=True):
            if entry.nbytes:
                data = flat_bytes(tensor).cpu().numpy()
                unit.pieces += self._in_files(entry, data) or [self._write(entry, data)]
        return slab.blanks()

    def start(self, unit: int, target: Tensor, after: Any) -> Wait:
        stored = self._units[unit]
        target = target[: stored.nbytes]
        if stored.memory is not None:
            mark = self._queue.copy(target, stored.memory, after)
            return lambda: mark
        if self._staging is None:
            return self._read(stored, target)
        return self._staging.start(stored.nbytes, lambda buffer: self._read(stored, buffer), target, after)

    def close(self) -> None:
        """Drop the buffers."""
        if self._staging is not None:
            self._staging.close()

    def _read(self, unit: _Unit, target: Tensor) -> Wait:
        """Let the threads read a unit; the result waits for them."""
        memory = target.numpy()
        futures = [
            self._pool.submit(_read, piece.file, piece.start + at, memory[piece.target + at :][: min(CHUNK, left)])
            for piece in unit.pieces
            for at in range(0, piece.nbytes, CHUNK)
            if (left := piece.nbytes - at)
        ]

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def _in_files(self, entry: Entry, data: np.ndarray) -> list[Piece] | None:
        """Where files of the checkpoint hold exactly `data`."""
        spans = self._locate(entry)
        if not spans or sum(span.nbytes for span in spans) != entry.nbytes:
            return None
        pieces, done = [], 0
        for span in spans:
            file = self._opened(span.file).fileno()
            for at in range(0, span.nbytes, CHUNK):
                there = np.empty(min(CHUNK, span.nbytes - at), np.uint8)
                _read(file, span.start + at, there)
                if not np.array_equal(there, data[done + at :][: there.size]):
                    return None
            pieces.append(Piece(file, span.start, entry.offset + done, span.nbytes))
            done += span.nbytes
        return pieces

    def _opened(self, path: Path) -> IO[bytes]:
        """A file of the checkpoint, kept open: replacing it by another does not change what is read."""
        if path not in self._files:
            file = self._files[path] = path.open("rb", buffering=0)
            weakref.finalize(self, file.close)
        return self._files[path]

    def _write(self, entry: Entry, data: np.ndarray) -> Piece:
        """Add bytes to the temporary file. Raises ResourceError when the disk is full."""
        folder = cache_folder()
        try:
            if self._spill is None:
                self._spill = tempfile.TemporaryFile(dir=folder, buffering=0)
                weakref.finalize(self, self._spill.close)
            start, written, view = self.spilled, 0, memoryview(data)  # type: ignore[arg-type]
            while written < len(view):
                written += os.pwrite(self._spill.fileno(), view[written:], start + written)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    str(folder), "the disk is full, and lazy_load keeps weights there", do="free some space"
                ) from error
            raise ResourceError(str(folder), f"cannot be written: {error.strerror or error}") from error
        self.spilled += written
        return Piece(self._spill.fileno(), start, entry.offset, written)


class _Staging:
    """Two buffers through which units pass to an accelerator, filled and copied by one thread in order."""

    def __init__(self, device: DeviceInfo, queue: CopyQueue) -> None:
        self._device, self._queue = device, queue
        self._thread = ThreadPoolExecutor(1, "offload-copy")
        self._buffers: list[Tensor | None] = [None, None]
        self._marks: list[Any] = [None, None]
        self._next = 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers if buffer is not None)

    def start(self, nbytes: int, read: Callable[[Tensor], Wait], target: Tensor, after: Any) -> Wait:
        """Fill the next buffer by `read` and copy it to `target`."""

        def work() -> Any:
            number, self._next = self._next, 1 - self._next
            self._queue.wait_here(self._marks[number])  # this thread waits, not the one that queues the blocks
            buffer = self._buffers[number]
            if buffer is None or buffer.numel() < nbytes:
                buffer = self._buffers[number] = host_memory(nbytes, self._device)
            read(buffer[:nbytes])()
            self._marks[number] = mark = self._queue.copy(target, buffer[:nbytes], after)
            return mark

        return self._thread.submit(work).result

    def close(self) -> None:
        self._thread.submit(lambda: None).result()  # it works in order
        for mark in self._marks:
            self._queue.wait_here(mark)
        self._buffers, self._marks = [None, None], [None, None]


def _read(file: int, start: int, target: np.ndarray) -> None:
    """Fill `target`, uint8, from byte `start` of an open file on."""
    view = memoryview(target)  # type: ignore[arg-type]
    while len(view):
        try:
            count = os.preadv(file, [view], start)
        except OSError as error:
            raise CheckpointError("offload", f"the weights cannot be read: {error.strerror or error}") from error
        if not count:
            raise CheckpointError("offload", "a file of weights became shorter while it was in use", do="start again")
        view, start = view[count:], start + count
