"""The checkpoint of a source as the engine reads its kind of model, and rows of tensors that it puts together."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lightx2v.convert.options import DIFFUSERS
from lightx2v.convert.source import RowReader
from lightx2v.encoders.keymap import t5_v1_1_linear_shapes
from lightx2v.errors import CheckpointError
from lightx2v.io.assembled import Assembled, Piece, taken
from lightx2v.io.derived import Derived
from lightx2v.io.weights import Checkpoint
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.spec import FLUX
from lightx2v.models.wan.spec import WAN

_KEPT = 16
"""Tensors that are made once for all of their rows, at most."""
_UMT5 = r"\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias"
"""T5 has this in the first block alone."""
_MARKS: Mapping[str, tuple[str, str]] = {
    "wan_dit": (r"(?:^|\.)blocks\.\d+\.(?:self_attn|attn1)\.", ""),
    "flux_dit": (r"(?:^|\.)(?:double_blocks|single_transformer_blocks)\.\d+\.", ""),
    "wan_t5": (rf"^blocks\.\d+\.ffn\.fc1\.|{_UMT5}", ""),
    "flux_t5": (r"\.block\.0\.layer\.1\.DenseReluDense\.wi_1\.", _UMT5),
    "wan_clip": (r"^visual\.transformer\.\d+\.", ""),
}
"""By model type: what is in the name of some tensor, and what is in none."""


class Rows(Protocol):
    """Reads rows [start, stop) of a tensor, or all of one without dimensions. Threads may read at once."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


class PieceReader:
    """The same for tensors that are put together of pieces of others."""

    def __init__(self, checkpoint: Assembled) -> None:
        self._checkpoint, self._files = checkpoint, open_rows(checkpoint.base)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape, pieces = self._checkpoint.tensors[name].shape, self._checkpoint.pieces[name]
        if not shape:
            return self._whole(pieces[0])
        stop = shape[0] if stop is None else stop
        found, first = [], 0
        for piece in pieces:
            height = self._height(piece)
            begin, end = max(start - first, 0), min(stop - first, height)
            if begin < end:
                found.append(self._taken(piece, begin, end))
            first += height
        return found[0] if len(found) == 1 else torch.cat(found)

    def _height(self, piece: Piece) -> int:
        if piece.repeat is not None:
            return piece.repeat
        return len(range(self._checkpoint.base.tensors[piece.name].shape[0])[piece.start : piece.stop])

    def _taken(self, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a piece."""
        if piece.repeat is not None or piece.scale is not None:  # numbers of its own, or layers outside the blocks
            return self._whole(piece)[start:stop]
        rows = self._files.rows(piece.name, piece.start + start, piece.start + stop)
        return taken({piece.name: rows}, piece._replace(start=0, stop=None))

    def _whole(self, piece: Piece) -> Tensor:
        names = [name for name in (piece.name, piece.scale) if name is not None]
        return taken({name: self._files.rows(name) for name in names}, piece)


class MadeReader:
    """The same for tensors that are made of others. The last ones are kept, since their rows are asked for in turn."""

    def __init__(self, checkpoint: Derived) -> None:
        self._checkpoint, self._files = checkpoint, open_rows(checkpoint.base)
        self._made = lru_cache(maxsize=_KEPT)(checkpoint.load)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        recipe = self._checkpoint.recipes[name]
        if isinstance(recipe, str):
            return self._files.rows(recipe, start, stop)
        made = self._made(name)
        return made[start:stop] if made.dim() else made


def open_rows(checkpoint: Checkpoint) -> Rows:
    """What reads the rows of the tensors of `checkpoint`. Raises CheckpointError for a .gguf file."""
    if isinstance(checkpoint, Assembled):
        return PieceReader(checkpoint)
    return MadeReader(checkpoint) if isinstance(checkpoint, Derived) else RowReader(checkpoint)


def open_model(model_type: str, weights: Path) -> Checkpoint:
    """The tensors of the model in a file that may hold others too, in the pieces in which the engine has them.

    Raises CheckpointError for a model of another kind.
    """
    checkpoint = Checkpoint.open(weights)
    _check_kind(model_type, checkpoint.tensors, str(weights))
    if model_type == "wan_dit":
        checkpoint = WAN.open(weights)
    elif model_type == "flux_dit":
        checkpoint = FLUX.open(weights)
        FluxArch.from_shapes({name: info.shape for name, info in checkpoint.tensors.items()}, str(weights))
    elif model_type == "flux_t5":
        from lightx2v.encoders.t5 import open_t5  # imports transformers

        checkpoint = open_t5(weights, quantized=True)
        t5_v1_1_linear_shapes(checkpoint.tensors, str(weights))
    if isinstance(checkpoint, Assembled):  # each tensor is called there as its first piece is in the file
        named = {name: replace(info, name=name) for name, info in checkpoint.tensors.items()}
        return replace(checkpoint, tensors=named)
    return checkpoint


def file_names(checkpoint: Checkpoint) -> Collection[str]:
    """The names of the tensors in the files."""
    return (checkpoint.base if isinstance(checkpoint, Assembled) else checkpoint).tensors.keys()


def unread(checkpoint: Checkpoint) -> list[str]:
    """Tensors of the files that are not the model's."""
    if not isinstance(checkpoint, Assembled):
        return []
    used = {name for pieces in checkpoint.pieces.values() for piece in pieces for name in (piece.name, piece.scale)}
    return [name for name in checkpoint.base.tensors if name not in used]


def _check_kind(model_type: str, names: Collection[str], where: str) -> None:
    def some(mark: str) -> bool:
        return any(re.search(mark, name) for name in names)

    found = [kind for kind, (has, lacks) in _MARKS.items() if some(has) and not (lacks and some(lacks))]
    if found and model_type not in (*found, DIFFUSERS):
        raise CheckpointError(where, f"is not a {model_type}", do=f"use --model_type {found[0]}")
