"""A checkpoint directory, written file by file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.files import whole_file
from lightx2v.io.headers import TensorInfo, read_header
from lightx2v.io.weights import write_safetensors


class ShardWriter:
    """The files of one checkpoint directory and the index that names the file of each tensor."""

    def __init__(
        self,
        folder: str | Path,
        metadata: Mapping[str, str],
        index: str = "diffusion_pytorch_model.safetensors.index.json",
    ) -> None:
        self.folder, self.metadata, self.index = Path(folder), dict(metadata), index
        self._tensors: dict[str, TensorInfo] = {}

    def done(self, file_name: str) -> bool:
        """Whether an earlier run with the same metadata wrote this file; if so the index takes it over."""
        path = self.folder / file_name
        try:
            infos, metadata = read_header(path)
        except CheckpointError:
            return False
        if metadata == self.metadata:
            self._record(file_name, infos)
        return metadata == self.metadata

    def write(self, file_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file of the directory, as `write_safetensors` does."""
        path = self.folder / file_name
        write_safetensors(path, tensors, self.metadata)
        self._record(file_name, read_header(path)[0])

    def finish(self) -> Path:
        """Write the index, last of all, and return its path."""
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in self._tensors.values())},
            "weight_map": {name: info.file.name for name, info in sorted(self._tensors.items())},
        }
        path = self.folder / self.index
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return path

    def _record(self, file_name: str, infos: Iterable[TensorInfo]) -> None:
        for info in infos:
            if self._tensors.setdefault(info.name, info).file != info.file:
                both = f"{self._tensors[info.name].file.name} and {file_name}"
                raise CheckpointError(str(self.folder), f"tensor '{info.name}' is written to both {both}")
