"""The files of a calibration: finished ones wait in a folder of their own, and take their names when all are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from torch import Tensor

from lightx2v import __version__
from lightx2v.calibrate.part import PartResult
from lightx2v.calibrate.report import LayerReport
from lightx2v.convert.configs import INDEX, write_index, write_json
from lightx2v.io.declared import declare_layers
from lightx2v.io.headers import read_header
from lightx2v.io.source import Source
from lightx2v.io.weights import write_safetensors
from lightx2v.mm.scheme import Scheme

REST = "non_block"
REPORT = "calibration.json"
_IDENTITY = "identity"


class Output:
    """Writes one file for each part, and knows which an earlier run of the same `identity` has written."""

    def __init__(self, folder: Path, staging: Path, identity: str) -> None:
        self.folder, self.staging, self.identity = folder, staging, identity

    def resume(self, parts: Sequence[str]) -> int:
        """How many of the parts are there already. What another calibration has left is removed."""
        known = self.staging / _IDENTITY
        if not known.is_file() or known.read_text("utf-8") != self.identity:
            self.begin()
        done = 0
        while done < len(parts) and self._file(parts[done]).is_file() and self._told(parts[done]).is_file():
            done += 1
        if done:
            logger.info("{} of {} parts are there from an earlier run", done, len(parts))
        return done

    def begin(self) -> None:
        """Remove what any earlier run has left."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        (self.staging / _IDENTITY).write_text(self.identity, "utf-8")

    def write(self, part: str, prefix: str, source: Source, result: PartResult, schemes: Mapping[str, Scheme]) -> None:
        """The tensors of one part, whose names begin with `prefix`: those that were made, the others as they are."""
        solved = result.solved
        told = {name: {"mm_type": declared_name(schemes[name]), **one.told} for name, one in solved.items()}
        write_json(self._told(part), told)
        replaced = {f"{name}.weight" for name in solved} | result.edited.keys()
        names = [name for name in source.names if name.startswith(prefix) and name not in replaced]
        tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in source.read(names)}
        tensors |= result.edited
        for name, one in solved.items():
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in one.leaves.items()}
        declared = declare_layers({name: declared_name(schemes[name]) for name in solved}, result.folded)
        write_safetensors(self._file(part), tensors, {"lightx2v": __version__, **declared})

    def write_rest(self, prefixes: Sequence[str], source: Source) -> None:
        """What is in no part."""
        names = [name for name in source.names if not name.startswith(tuple(prefixes))]
        if names:
            write_safetensors(self._file(REST), {name: tensor.clone() for name, tensor in source.read(names)}, {})

    def reports(self, parts: Sequence[str]) -> dict[str, LayerReport]:
        """What was told of every layer of the parts."""
        layers = {}
        for part in parts:
            for name, told in json.loads(self._told(part).read_text("utf-8")).items():
                layers[name] = LayerReport(told.pop("mm_type"), told.pop("error"), told)
        return layers

    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.staging.glob("*.safetensors"))

    def publish(self, parts: Sequence[str], report: Mapping[str, Any]) -> None:
        """Give the files their names, the index last."""
        files = [self._file(part) for part in (*parts, REST) if self._file(part).is_file()]
        (self.folder / INDEX).unlink(missing_ok=True)
        weight_map: dict[str, str] = {}
        total = 0
        for file in files:
            infos, _ = read_header(file)
            weight_map |= {info.name: file.name for info in infos}
            total += sum(info.nbytes for info in infos)
            os.replace(file, self.folder / file.name)
        write_json(self.folder / REPORT, dict(report))
        write_index(self.folder, weight_map, total)
        shutil.rmtree(self.staging, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self.staging / f"{part}.safetensors"

    def _told(self, part: str) -> Path:
        return self.staging / f"{part}.json"


def declared_name(scheme: Scheme) -> str:
    """A scheme without its library, as files say it."""
    return scheme.with_library("auto").name.removesuffix("-Auto")
