"""Output files that are written piece by piece in any order, and that appear whole or not at all.

The header of a safetensors file depends on names, dtypes and shapes alone, so it is written first, and each piece of a
tensor goes to its place as soon as it is there: memory does not grow with the file.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.io.files import whole_file


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of an output file. `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.item_bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


class OutputFile(Protocol):
    """A file under construction. `write` puts rows at `first_row` of a tensor; threads may call it at once."""

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None: ...


class _Safetensors:
    def __init__(self, stream: IO[bytes], slots: Iterable[Slot], metadata: Mapping[str, str]) -> None:
        self._stream, self._lock = stream, threading.Lock()
        # Wide dtypes first, as the safetensors library orders them, keep every tensor aligned.
        ordered = sorted(slots, key=lambda slot: (-slot.item_bytes, slot.name))
        self._slots = {slot.name: slot for slot in ordered}
        self._missing = {slot.name: slot.nbytes for slot in ordered}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._begin: dict[str, int] = {}
        end = 0
        for slot in ordered:
            self._begin[slot.name], end = end, end + slot.nbytes
            offsets = [self._begin[slot.name], end]
            header[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(self._data + end)

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        slot = self._slots[name]
        _check(slot, rows)
        view = rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            self._stream.seek(self._data + self._begin[name] + first_row * slot.row_bytes)
            written = 0
            while written < len(view):
                written += self._stream.write(view[written:])
            self._missing[name] -= len(view)

    def finish(self) -> None:
        unfinished = [name for name, missing in self._missing.items() if missing]
        if unfinished:
            raise RuntimeError(f"not all of {unfinished[0]} was written")


class _Pickle:
    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = {slot.name: slot for slot in slots}
        self._tensors = {slot.name: torch.empty(slot.shape, dtype=TORCH_DTYPES[slot.dtype]) for slot in slots}

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        _check(self._slots[name], rows)
        target = self._tensors[name]
        if target.dim():
            target = target[first_row : first_row + rows.shape[0]]
        target.copy_(rows)

    def save(self, path: Path) -> None:
        torch.save(self._tensors, path)


def _check(slot: Slot, rows: Tensor) -> None:
    if rows.dtype != TORCH_DTYPES[slot.dtype] or tuple(rows.shape[1:]) != slot.shape[1:]:
        raise ValueError(f"{slot.name}: {rows.dtype} {tuple(rows.shape)} is no part of {slot.dtype} {slot.shape}")


@contextmanager
def open_output(path: Path, slots: Iterable[Slot], metadata: Mapping[str, str]) -> Iterator[OutputFile]:
    """A new .safetensors or .pth file that takes its name when the body has ended well.

    A .pth file is gathered in memory, and has no place for metadata. Raises ResourceError when the disk is full.
    """
    slots = tuple(slots)
    with whole_file(path, needed=sum(slot.nbytes for slot in slots)) as temporary:
        if path.suffix == ".safetensors":
            with temporary.open("r+b", buffering=0) as stream:
                file = _Safetensors(stream, slots, metadata)
                yield file
                file.finish()
        elif path.suffix == ".pth":
            pickled = _Pickle(slots)
            yield pickled
            pickled.save(temporary)
        else:
            raise CheckpointError(str(path), "has an unknown ending", allowed=".safetensors, .pth")
