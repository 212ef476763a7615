"""Where the weights are, what identifies them, and their rows, read without mapping whole files into memory."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightx2v.convert.options import DIFFUSERS
from lightx2v.errors import CheckpointError
from lightx2v.foreign.index import weights_in
from lightx2v.io import pickles
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.io.gguf import ENDING
from lightx2v.io.headers import TensorInfo, read_header
from lightx2v.io.layout import PICKLES
from lightx2v.io.weights import Checkpoint
from lightx2v.models.spec import FAMILIES, FamilySpec

_PARTS = {
    "wan_dit": "dit",
    "wan_t5": "text_encoder",
    "wan_clip": "image_encoder",
    "flux_dit": "dit",
    "flux_t5": "text_encoder_2",
}
_SAMPLES, _SAMPLE_BYTES = 1024, 64


def locate(source: Path, model_type: str) -> tuple[Path, Path | None]:
    """The weights of `model_type` in a file or a model directory, and the config.json that describes them.

    A directory that is no whole model is taken as the weights themselves. Raises CheckpointError.
    """
    if not source.exists():
        raise CheckpointError(str(source), "no such file or directory")
    folder = source if source.is_dir() else source.parent
    config: Path | None = folder / "config.json"
    weights = source
    if model_type == DIFFUSERS:
        if not (folder / "config.json").is_file():
            raise CheckpointError(str(folder), "has no config.json", do="give the folder transformer or unet itself")
        inside = weights_in(folder) if source.is_dir() else None
        return source if inside is None else inside[0], config
    if source.is_dir():
        family = FAMILIES["flux" if model_type.startswith("flux") else "wan2.1"]
        models = [found for task in family.tasks if (found := _model(family, source, task))]
        parts = {path: model for model in models if (path := getattr(model, _PARTS[model_type])) is not None}
        if len(parts) > 1:
            names = ", ".join(sorted(str(part) for part in parts))
            raise CheckpointError(str(source), f"holds several models: {names}", do="give one of them as --source")
        for part, model in parts.items():
            weights, config = part, getattr(model, "config", part.parent / "config.json")
    if config is not None and (not model_type.endswith("_dit") or not config.is_file()):
        config = None
    return weights, config


def _model(family: FamilySpec, folder: Path, task: str) -> Any:
    """Where the parts of a model directory of `family` are; None for a folder that is none."""
    try:
        return family.detect(folder, task)
    except CheckpointError:
        return None


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of what identifies a checkpoint without reading it all.

    It covers the name, dtype and shape of every tensor, and of every file its size and 64 bytes at each of 1024 evenly
    spaced places.
    """
    digest = hashlib.sha256()
    for info in sorted(checkpoint.tensors.values(), key=lambda info: info.name):
        digest.update(f"{info.name} {info.dtype} {info.shape}\n".encode())
    for file in checkpoint.files:
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb", buffering=0) as stream:
            for index in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class RowReader:
    """Rows of the tensors of a checkpoint. Threads may read at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._offsets: dict[str, int] = {}
        for file in checkpoint.files:
            if file.suffix == ENDING:
                raise CheckpointError(str(file), "a .gguf file is not converted", do="convert what it was made from")
            if file.suffix not in PICKLES:
                self._offsets |= _offsets(file, checkpoint.tensors.values())
        self._lock = threading.Lock()
        self._pickled: tuple[str, Tensor] | None = None

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) along the first dimension, on the CPU; a tensor without dimensions has no rows."""
        info = self._checkpoint.tensors[name]
        if name not in self._offsets:
            tensor = self._from_pickle(info)
            return tensor[start:stop] if tensor.dim() else tensor
        dtype = TORCH_DTYPES[info.dtype]
        row = math.prod(info.shape[1:])
        if info.shape:
            stop = info.shape[0] if stop is None else stop
            shape: tuple[int, ...] = (stop - start, *info.shape[1:])
        else:
            shape, start = (), 0
        result = torch.empty(math.prod(shape), dtype=dtype)
        if result.numel():
            self._read(info, self._offsets[name] + start * row * dtype.itemsize, result)
        return result.view(shape)

    def _read(self, info: TensorInfo, offset: int, into: Tensor) -> None:
        view = into.view(torch.uint8).numpy().data
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise CheckpointError(str(info.file), "ends too soon", do="was it changed meanwhile?")
                done += count

    def _from_pickle(self, info: TensorInfo) -> Tensor:
        # The file is mapped anew for each tensor: pages of one that has been used stay resident until it is unmapped.
        with self._lock:
            if self._pickled is None or self._pickled[0] != info.name:
                self._pickled = None
                self._pickled = info.name, pickles.read_state(info.file)[info.name]
            return self._pickled[1]


def _offsets(file: Path, wanted: Iterable[TensorInfo]) -> dict[str, int]:
    """Where each tensor of a safetensors file begins; its tensors follow each other without holes to the end."""
    infos, _ = read_header(file)
    position = file.stat().st_size - sum(info.nbytes for info in infos)
    names = {info.name for info in wanted if info.file == file}
    found = {}
    for info in infos:
        if info.name in names:
            found[info.name] = position
        position += info.nbytes
    return found
