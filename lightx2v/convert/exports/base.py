"""What a writer of another package's files sees of a quantized layer, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.derived import Derived, Made
from lightx2v.io.headers import TensorInfo
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.integers import levels_of, unpack_integers
from lightx2v.quant.spec import QSpec

DIT_FILE, MODEL_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""What diffusers calls its weights, and what others do."""


@dataclass(frozen=True)
class Layer:
    """A quantized linear [n, k], K filled up to whole groups where codes are packed."""

    name: str
    """In the files to write."""
    mm_type: str
    scheme: Scheme
    n: int
    k: int
    stored: Mapping[str, TensorInfo]
    """Its tensors in the source by leaf, those of `quant.layouts` and the bias."""
    where: str
    held: str
    """What the package can hold, in words."""
    load: Callable[[str], Tensor]
    """A small tensor of the source by its name there, for a choice that hangs on its values."""

    @property
    def spec(self) -> QSpec:
        assert self.scheme.weight is not None
        return self.scheme.weight

    def same(self, leaf: str) -> Made:
        """The tensor as it is."""
        info = self.stored[leaf]
        return self.made(lambda given: given[leaf], info.dtype, info.shape, leaf)

    def floats(self, leaf: str, shape: tuple[int, ...]) -> Made:
        """The tensor as float32 of `shape`."""
        return self.made(lambda given: given[leaf].float().reshape(shape), "F32", shape, leaf)

    def made(
        self, make: Callable[[Mapping[str, Tensor]], Tensor], dtype: str, shape: tuple[int, ...], *leaves: str
    ) -> Made:
        """A tensor that is made of `leaves`, which `make` is given by these names."""
        names = {leaf: self.stored[leaf].name for leaf in leaves}
        return Made(
            tuple(names.values()),
            lambda given: make({leaf: given[name] for leaf, name in names.items()}),
            dtype,
            shape,
        )

    def bias(self, name: str | None = None) -> dict[str, Made | str]:
        """Its bias, if there is one, as it is; under the layer `name` if that is another one."""
        return {f"{name or self.name}.bias": self.stored["bias"].name} if "bias" in self.stored else {}

    def refuse(self, what: str = "") -> CheckpointError:
        """The error to raise for what the package has no place for."""
        return CheckpointError(
            self.where,
            f"layer '{self.name}' is {self.mm_type}{f', {what}' if what else ''}",
            allowed=self.held,
            do="convert the float model with the scheme that is wanted, or leave --to out",
        )

    def check_whole(self, last: Tensor, zero: Tensor | None = None) -> None:
        """Refuse a layer whose last column may be filling: the source does not say how long rows are without it.

        `last` are the codes of that column, [N], which for filling are 0 in all rows, or what `zero` [N] rounds to.
        """
        fillings = [torch.zeros_like(last)]
        if zero is not None:
            fillings.append(zero.round().clamp(0, levels_of(self.spec) - 1).to(last.dtype))
        if any(torch.equal(last, filling) for filling in fillings):
            raise self.refuse("and its last columns are zeros, which may be the filling of a last group")


@dataclass(frozen=True)
class Exported:
    """A layer as a package has it."""

    kind: str
    """What the package calls the type."""
    tensors: Mapping[str, Made | str]
    """By their names in its file: how they are made, or what they are called in the source."""


@dataclass(frozen=True)
class Written:
    """A file of weights that is there, for what describes it."""

    path: Path
    tensors: Derived
    kinds: Mapping[str, str]
    """What the package calls the type of each quantized layer."""
    owners: Mapping[str, str]
    """The layer of each tensor of a quantized layer."""


class Export(Protocol):
    """Writes the files of one package."""

    held: str
    """What it can hold, in words."""

    def layer(self, layer: Layer) -> Exported:
        """Its tensors. Raises CheckpointError for a scheme that the package does not hold."""
        ...

    def beside(self, kinds: Mapping[str, str]) -> Mapping[str, Made]:
        """Tensors of no layer that it has in its file as well. `kinds` are what it calls the types of the layers."""
        ...

    def file(self, name: str, is_dit: bool, kinds: Mapping[str, str]) -> str:
        """The name of the file of weights; `name` is the one that the user wants where there is a choice.

        Raises CheckpointError for types that do not go together.
        """
        ...

    def describe(self, written: Written) -> None:
        """Write what lies beside the weights."""
        ...


def last_codes(packed: Tensor, spec: QSpec) -> Tensor:
    """The codes [N] of the last column of packed integers [N, bytes]."""
    width = 3 if spec.dtype == "int3" else 1  # bytes that hold whole codes
    return unpack_integers(packed[:, -width:], spec)[:, -1]
