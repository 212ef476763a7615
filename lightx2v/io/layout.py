"""Which files make up a checkpoint: one file, an index, or a directory of parts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from lightx2v.errors import CheckpointError

PICKLES = (".pth", ".pt", ".bin")
_ENDINGS = (".safetensors", *PICKLES, ".gguf")
_INDEX = ".index.json"
_SECOND = ("fp8_scales.safetensors",)
"""Files that repeat what is in the others: AngelSlim's scales."""


def checkpoint_files(path: Path) -> tuple[list[Path], Mapping[str, Path]]:
    """The files of a checkpoint in natural order, and which of them an index names for each tensor (empty: no index).

    Raises CheckpointError when nothing is there, when parts are missing, or when it is unclear which file is meant.
    """
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        raise CheckpointError(str(path), "no such file or directory")
    if path.name.endswith(_INDEX):
        return _indexed(path)
    if path.suffix not in _ENDINGS:
        raise CheckpointError(
            str(path),
            f"has the unknown ending '{path.suffix}'",
            allowed=", ".join((*_ENDINGS, "*" + _INDEX, "a directory")),
        )
    return [path], {}


def natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts block_2 before block_10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _directory(folder: Path) -> tuple[list[Path], Mapping[str, Path]]:
    entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=natural)
    indices = [entry for entry in entries if entry.name.endswith(_INDEX)]
    if len(indices) > 1:
        names = ", ".join(entry.name for entry in indices)
        raise CheckpointError(str(folder), f"has several index files: {names}", do="give the path of one of them")
    if indices:
        return _indexed(indices[0])
    files = [entry for entry in entries if entry.suffix == ".safetensors" and entry.is_file()]
    files = [file for file in files if file.name not in _SECOND] or files
    if not files:
        raise _nothing(folder, entries)
    _check_parts(folder, [file.stem for file in files])
    return files, {}


def _nothing(folder: Path, entries: Iterable[Path]) -> CheckpointError:
    there = [entry.name for entry in entries if entry.suffix in (*PICKLES, ".gguf")]
    there += [f"{entry.name}/" for entry in entries if entry.is_dir() and any(entry.glob("*.safetensors"))]
    do = f"give one of these in it: {', '.join(there[:10])}" if there else ""
    return CheckpointError(str(folder), "has no .safetensors files", do=do)


def _indexed(index: Path) -> tuple[list[Path], Mapping[str, Path]]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(index), f"is not an index with a weight_map: {error!r}") from error
    for name in set(names.values()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.endswith(_ENDINGS):
            raise CheckpointError(str(index), f"names the file {name!r}, which is not a weights file beside it")
    files = sorted({index.parent / name for name in names.values()}, key=natural)
    _refuse(index, [file.name for file in files if not file.is_file()])
    return files, {name: index.parent / file for name, file in names.items()}


def _check_parts(folder: Path, stems: list[str]) -> None:
    """Refuse a directory in which the numbering of its parts shows that some are absent."""
    missing: list[str] = []
    of = [match for stem in stems if (match := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})", stem))]
    for base, total in {(match[1], match[3]) for match in of}:
        missing += [f"{base}-{number:05d}-of-{total}" for number in range(1, int(total) + 1)]
    for prefix, first in (("block_", 0), (r".*_part", 1)):
        found = [match for stem in stems if (match := re.fullmatch(rf"({prefix})(\d{{1,5}})", stem))]
        for base in {match[1] for match in found}:
            numbers = [int(match[2]) for match in found if match[1] == base]
            missing += [f"{base}{number}" for number in range(min(first, *numbers), max(numbers) + 1)]
        if prefix == "block_" and found:
            missing.append("non_block")
    _refuse(folder, [f"{stem}.safetensors" for stem in missing if stem not in stems])


def _refuse(where: Path, missing: list[str]) -> None:
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise CheckpointError(str(where), f"{len(missing)} of its files are missing: {shown}", do="copy them too")
