"""The tensors of a model's checkpoint by the model's own names, read again as often as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.comfy import stream_marks
from lightx2v.io.headers import read_header
from lightx2v.io.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class FileSpan:
    """So many bytes of a file from `start` on."""

    file: Path
    start: int
    nbytes: int


class Source(Protocol):
    """Where the tensors of a model come from. What it gives has been through all that changes weights at loading."""

    @property
    def names(self) -> Collection[str]:
        """The model's name of every tensor there is."""
        ...

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of `names` or of all; use one before asking for the next, and copy what is kept."""
        ...

    def locate(self, name: str) -> FileSpan | None:
        """Where the bytes of a tensor lie in a file, if they are as they were there."""
        ...


class CheckpointSource:
    """The tensors of a `Checkpoint`, renamed by `rename`; `raw` are the model's names whose .gguf blocks stay bytes.

    The marks that ComfyUI's metadata stands for are among them, and names for which `unused` holds are not.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rename: Callable[[str], str],
        unused: Callable[[str], bool],
        raw: Collection[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self._file_names = {rename(name): name for name in checkpoint.tensors if not unused(name)}
        self._model_names = {name: renamed for renamed, name in self._file_names.items()}
        self._rename, self._raw = rename, {self._file_names[name] for name in raw if name in self._file_names}
        self._marks = {rename(name): mark for name, mark in stream_marks(checkpoint)}
        self._seen = _states(checkpoint)
        self._starts: dict[Path, dict[str, int]] = {}

    @property
    def names(self) -> Collection[str]:
        return (*self._file_names, *self._marks)

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """As `Source.read`. Raises CheckpointError when a file has changed since the checkpoint was opened."""
        if _states(self.checkpoint) != self._seen:
            raise CheckpointError(
                str(self.checkpoint.path), "has changed since the model was loaded from it", do="start again"
            )
        wanted = set(self.names if names is None else names)
        in_files = [file_name for name, file_name in self._file_names.items() if name in wanted]
        marks = ((name, mark) for name, mark in self._marks.items() if name in wanted)
        stored = self.checkpoint.stream(in_files, self._raw)
        # A .gguf file gives a second tensor with the blocks of one, whose name is in no header.
        return chain(((self._model_names.get(name) or self._rename(name), t) for name, t in stored), marks)

    def locate(self, name: str) -> FileSpan | None:
        """As `Source.locate`: for the tensors of .safetensors files."""
        info = self.checkpoint.stored(self._file_names.get(name, ""))
        if info is None or info.file.suffix != ".safetensors":
            return None
        if info.file not in self._starts:
            self._starts[info.file] = _first_bytes(info.file)
        return FileSpan(info.file, self._starts[info.file][info.name], info.nbytes)


def _first_bytes(file: Path) -> dict[str, int]:
    """The first byte of every tensor of a .safetensors file, which has no holes between them."""
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    starts = {}
    for info in read_header(file)[0]:
        starts[info.name] = start
        start += info.nbytes
    return starts


def _states(checkpoint: Checkpoint) -> list[tuple[Path, int, int]]:
    """What tells whether a file is still the same."""
    try:
        return [(file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in checkpoint.files]
    except OSError as error:
        raise CheckpointError(str(checkpoint.path), f"can no longer be read: {error.strerror or error}") from error
