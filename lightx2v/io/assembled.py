"""A checkpoint as the model has its tensors, where the files hold them in other pieces or as plain casts to 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.comfy import LEAF as MARK
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint
from lightx2v.quant.layouts import SCALE_LEAVES

_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_FLOAT = "BF16"
"""What 8-bit numbers that count as floats become: it holds them all."""
SCALED = "scaled_fp8"
"""ComfyUI's mark of a file whose 8-bit weights have scales: a tensor of no layer."""
_SCALES = ("weight_scale", "scale_weight")


class Piece(NamedTuple):
    """Rows [start, stop) of the tensor `name` of a file."""

    name: str
    start: int = 0
    stop: int | None = None
    repeat: int | None = None
    """Take the one number that it holds for so many rows, as [repeat, 1]."""
    scale: str | None = None
    """The tensor of the file that it is multiplied with."""
    as_float: bool = False
    """Whether 8-bit numbers become 16-bit ones, as they must where no quantized layer reads them."""


Pieces = Mapping[str, tuple[Piece, ...]]
"""By the model's names: what each tensor is made of, one piece under the other."""


@dataclass(frozen=True, eq=False)
class Assembled(Checkpoint):
    """A checkpoint whose `tensors` have the model's names; each is put together as it is streamed."""

    base: Checkpoint
    """As the files are."""
    pieces: Pieces

    def stream(self, names: Iterable[str] | None = None, raw: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """As `Checkpoint.stream`, in the order in which tensors become complete."""
        wanted = list(self.tensors) if names is None else self._in_order(names)
        users: dict[str, list[str]] = {}
        for name in wanted:
            for part in _needed(self.pieces[name]):
                users.setdefault(part, []).append(name)
        held: dict[str, dict[str, Tensor]] = {}
        for stored, tensor in self.base.stream(users, {self.pieces[name][0].name for name in raw}):
            if stored not in users:  # what a .gguf file gives beside the blocks of a tensor
                of, _, leaf = stored.rpartition("_")
                yield f"{users[of][0]}_{leaf}", tensor
                continue
            for name in users[stored]:
                needed = _needed(self.pieces[name])
                if len(needed) == 1:
                    yield name, self._made(name, {stored: tensor})
                    continue
                here = held.setdefault(name, {})
                here[stored] = tensor.clone()
                if len(here) == len(needed):
                    yield name, self._made(name, held.pop(name))

    def stored(self, name: str) -> TensorInfo | None:
        """As `Checkpoint.stored`: for tensors of one piece that is not changed."""
        (first, *others) = self.pieces.get(name, ()) or (None,)
        return self.base.stored(first.name) if first is not None and first == Piece(first.name) and not others else None

    def _made(self, name: str, given: Mapping[str, Tensor]) -> Tensor:
        parts = [taken(given, piece) for piece in self.pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def assemble(base: Checkpoint, pieces: Pieces) -> Assembled:
    """`base` with its tensors put together as `pieces` tells. Raises CheckpointError for pieces that do not fit."""
    tensors = {name: _described(base, name, parts) for name, parts in pieces.items()}
    return Assembled(base.path, base.files, tensors, base.metadata, base, pieces)


def read_part(path: Path, prefix: str, quantized: Callable[[str], bool]) -> Checkpoint:
    """One model of a file that may hold others too: those tensors whose names have `prefix`, if there are any, or all.

    They lose the prefix. 8-bit numbers are as `read_as_floats` makes them. Raises CheckpointError.
    """
    base = Checkpoint.open(path)
    there = [name for name in base.tensors if name.startswith(prefix)]
    names = {name.removeprefix(prefix): (Piece(name),) for name in there or base.tensors if name != SCALED}
    return assemble(base, read_as_floats(base, names, quantized))


def read_as_floats(base: Checkpoint, pieces: Pieces, quantized: Callable[[str], bool]) -> Pieces:
    """`pieces`, with all 8-bit numbers turned into floats that are not codes of a layer that may be `quantized`.

    ComfyUI's files hold every tensor as a plain cast to 8 bits, or the weights of all linears with a scale.
    """
    result = dict(pieces)
    for name, parts in pieces.items():
        layer, _, leaf = name.rpartition(".")
        if base.tensors[parts[0].name].dtype not in _EIGHT_BITS or leaf in SCALE_LEAVES:
            continue
        own = next((found for scale in _SCALES if (found := f"{layer}.{scale}") in pieces), None)
        if leaf != "weight" or own is None:
            result[name] = tuple(piece._replace(as_float=True) for piece in parts)
        elif not quantized(layer):
            scale = pieces[own][0].name
            result[name] = tuple(piece._replace(as_float=True, scale=scale) for piece in parts)
            for extra in (*SCALE_LEAVES, MARK):
                result.pop(f"{layer}.{extra}", None)
    return result


def _needed(pieces: Iterable[Piece]) -> tuple[str, ...]:
    """The tensors of the file that something is made of."""
    names = (name for piece in pieces for name in (piece.name, piece.scale) if name is not None)
    return tuple(dict.fromkeys(names))


def taken(given: Mapping[str, Tensor], piece: Piece) -> Tensor:
    """What a piece is of the tensors of the file, which `given` has by name."""
    tensor = given[piece.name]
    if piece.scale is not None:
        tensor = tensor.float() * given[piece.scale].float()
    if piece.as_float:
        tensor = tensor.to(TORCH_DTYPES[_FLOAT])
    if piece.repeat is not None:
        return tensor.reshape(1, 1).expand(piece.repeat, 1)
    whole = piece.start == 0 and piece.stop is None
    return tensor if whole else tensor[piece.start : piece.stop]


def _described(base: Checkpoint, name: str, pieces: tuple[Piece, ...]) -> TensorInfo:
    infos = [base.tensors[piece.name] for piece in pieces]
    first = infos[0]
    dtype = _FLOAT if pieces[0].as_float else first.dtype
    if pieces == (Piece(first.name),):
        return first
    shapes = [_shape(info, piece) for info, piece in zip(infos, pieces, strict=True)]
    if any((info.dtype, shape[1:]) != (first.dtype, shapes[0][1:]) for info, shape in zip(infos, shapes, strict=True)):
        listed = ", ".join(f"'{info.name}' {info.dtype} {list(info.shape)}" for info in infos)
        raise CheckpointError(str(base.path), f"these are one tensor, '{name}', and do not agree: {listed}")
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(str(first.file), f"blocks of {dtype} in '{first.name}' cannot be put together")
    shape = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return replace(first, dtype=dtype, shape=shape, nbytes=math.prod(shape) * TORCH_DTYPES[dtype].itemsize)


def _shape(info: TensorInfo, piece: Piece) -> tuple[int, ...]:
    if piece.repeat is not None:
        return (piece.repeat, 1)
    if piece.start == 0 and piece.stop is None:
        return info.shape
    return (len(range(info.shape[0])[piece.start : piece.stop]), *info.shape[1:])
