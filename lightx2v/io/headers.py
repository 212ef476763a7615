"""The header of a safetensors file, read and checked without touching a tensor.

Format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian length, that many bytes of JSON, the tensors.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lightx2v.errors import CheckpointError

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of every dtype that the format knows."""

_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint as its header describes it."""

    name: str
    dtype: str
    """Safetensors' name: "BF16", "F32", "I8", "F8_E4M3", ..."""
    shape: tuple[int, ...]
    file: Path
    nbytes: int


def read_header(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata.

    Raises CheckpointError for a file that is missing, truncated, not safetensors, or whose header does not describe
    exactly the bytes that follow it (overlaps, holes, sizes that do not fit the shape).
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            if _LFS.startswith(start) and start:
                raise CheckpointError(str(file), "is a Git LFS pointer, not the weights", do="run `git lfs pull`")
            if size < 8:
                raise CheckpointError(str(file), f"is not a safetensors file: it has {size} bytes", do="copy it again")
            length = int.from_bytes(start, "little")
            if not 2 <= length <= _MAX_HEADER:
                raise CheckpointError(
                    str(file), f"is not a safetensors file: its first 8 bytes ask for a header of {length:,} bytes"
                )
            if 8 + length > size:
                raise _truncated(file, 8 + length - size, "of the header")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror or error}") from error
    return _parse(file, text, size - 8 - length)


def _parse(file: Path, text: bytes, data_size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _invalid(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _invalid(file, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid(file, "its __metadata__ is not a map of strings")
    spans = sorted((_entry(file, name, entry) for name, entry in header.items()), key=lambda span: span[:2])
    position = 0
    for begin, end, info in spans:
        if begin != position:
            raise _invalid(file, f"tensor '{info.name}' begins at byte {begin:,}, where {position:,} was due")
        position = end
    if position > data_size:
        raise _truncated(file, position - data_size, f"of {position:,}")
    if position < data_size:
        raise _invalid(file, f"it has {data_size - position:,} bytes more than its header describes")
    return [info for _, _, info in spans], metadata


def _entry(file: Path, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """(begin, end, tensor) of one entry of the header."""
    if not isinstance(entry, dict):
        raise _invalid(file, f"tensor '{name}' is not described by a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _invalid(file, f"tensor '{name}' has the unknown dtype {dtype!r}")
    if not _sizes(shape):
        raise _invalid(file, f"tensor '{name}' has the invalid shape {shape!r}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(file, f"tensor '{name}' has the invalid data_offsets {offsets!r}")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != (end - begin) * 8:
        raise _invalid(file, f"tensor '{name}' ({dtype} {shape}) does not fit its {end - begin:,} bytes")
    return begin, end, TensorInfo(name, dtype, tuple(shape), file, end - begin)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' appears twice")
    return result


def _invalid(file: Path, what: str) -> CheckpointError:
    return CheckpointError(str(file), f"is not a valid safetensors file: {what}", do="copy or convert the file again")


def _truncated(file: Path, missing: int, of: str) -> CheckpointError:
    return CheckpointError(str(file), f"is truncated: {missing:,} bytes {of} are missing", do="copy the file again")
