"""A checkpoint whose tensors are made of those of its files: repacked, renamed, put together, dequantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint

Given = Mapping[str, Tensor]
"""Tensors of the files by the names they have there."""


class Made(NamedTuple):
    """A tensor that is made: of which tensors of the files, how, and what it then is. `dtype` is safetensors' name."""

    needs: tuple[str, ...]
    make: Callable[[Given], Tensor]
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, eq=False)
class Derived(Checkpoint):
    """`tensors` are described by what is known of the files' headers; each is made as it is streamed."""

    base: Checkpoint
    """As the files are."""
    recipes: Mapping[str, Made | str]
    """By the names of `tensors`: how it is made, or what it is called in the files when nothing changes."""

    def stream(self, names: Iterable[str] | None = None, raw: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """As `Checkpoint.stream`: what is as the files have it, then what is made, one layer after the other.

        Raises CheckpointError for tensors that do not hold what their format says.
        """
        wanted = list(self.tensors) if names is None else self._in_order(names)
        same = {source: name for name in wanted if isinstance(source := self.recipes[name], str)}
        blocks = {source for name in raw if isinstance(source := self.recipes[name], str)}
        for stored, tensor in self.base.stream(same, blocks) if same else ():
            # A .gguf file gives a second tensor with the blocks of one, whose name is in no header.
            yield same.get(stored, stored), tensor
        layers: dict[str, dict[str, Made]] = {}
        for name in wanted:
            if isinstance(made := self.recipes[name], Made):
                layers.setdefault(name.rpartition(".")[0], {})[name] = made
        for made_of in layers.values():
            needs = dict.fromkeys(need for made in made_of.values() for need in made.needs)
            given = {name: tensor.clone() for name, tensor in self.base.stream(needs)} if needs else {}
            for name, made in made_of.items():
                yield name, self._checked(name, made, made.make(given))

    def stored(self, name: str) -> TensorInfo | None:
        """As `Checkpoint.stored`: for tensors that are not made."""
        recipe = self.recipes.get(name)
        return self.base.stored(recipe) if isinstance(recipe, str) else None

    def _checked(self, name: str, made: Made, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != made.shape or tensor.dtype != TORCH_DTYPES[made.dtype]:
            is_, said = f"{tensor.dtype} {list(tensor.shape)}", f"{made.dtype} {list(made.shape)}"
            raise CheckpointError(str(self.path), f"'{name}' came out as {is_}, where its header says {said}")
        return tensor.contiguous()


def derive(base: Checkpoint, recipes: Mapping[str, Made | str], metadata: Mapping[str, str]) -> Derived:
    """`base` with the tensors of `recipes` in place of its own, and `metadata` beside its own."""
    tensors = {name: _described(base, name, recipe) for name, recipe in recipes.items()}
    return Derived(base.path, base.files, tensors, {**base.metadata, **metadata}, base, recipes)


def _described(base: Checkpoint, name: str, recipe: Made | str) -> TensorInfo:
    if isinstance(recipe, str):
        return replace(base.tensors[recipe], name=name)
    file = base.tensors[recipe.needs[0]].file if recipe.needs else base.files[0]
    return TensorInfo(name, recipe.dtype, recipe.shape, file, recipe.nbytes)
