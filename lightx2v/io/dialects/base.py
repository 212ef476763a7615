"""What a reader of another package's format sees, and what it collects: our tensors, made of the package's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.declared import declare_layers
from lightx2v.io.derived import Derived, Given, Made, derive
from lightx2v.io.dialects.floats import float_weight
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import parse
from lightx2v.quant.packing import swizzle, swizzled_shape

INT8_AFFINE = "W-int8-channel-sym-A-int8-channel-sym-dynamic-Auto-ActTorchaoAffine"
"""int8 inputs in the range that torchao's `choose_qparams_affine` and compressed-tensors give them."""


@dataclass(frozen=True)
class Wanted:
    """What the reader of a model does with its layers, by their names in the files."""

    quantized: Callable[[str], bool]
    """Whether a layer is one of those that hold codes: others become floats."""
    beyond: bool = False
    """Whether any other layer may hold codes too, if its inputs are quantized: floats would not give the same."""
    whole: bool = True
    """Whether layers stay as they are in the files: no rows of several become one."""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """[N, K] of layers by their names in the files, where the model is known: for formats that do not say."""


@dataclass(frozen=True)
class Found:
    """A checkpoint as its files are, and what lies beside them."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    """`quantization_config` of the config.json beside the weights; empty where there is none."""
    wanted: Wanted

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.checkpoint.tensors

    @property
    def where(self) -> str:
        return str(self.checkpoint.path)

    @property
    def folder(self) -> Path:
        """Where the weights lie."""
        return self.checkpoint.files[0].parent

    def beside(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file beside the weights; None where there is no such file. Raises CheckpointError."""
        return read_json(self.folder / name)

    def ending(self, *endings: str) -> list[str]:
        """Names of tensors, less one of `endings`, each once."""
        found = (name.removesuffix(end) for name in self.tensors for end in endings if name.endswith(end))
        return list(dict.fromkeys(found))

    def load(self, names: list[str]) -> dict[str, Tensor]:
        """Small tensors that say what others are."""
        return {name: tensor.clone() for name, tensor in self.checkpoint.stream(names)} if names else {}

    def refuse(self, what: str, allowed: str = "", do: str = "") -> CheckpointError:
        """The error to raise for what a format says and no reader here understands."""
        return CheckpointError(self.where, what, allowed=allowed, do=do)


class Dialect(Protocol):
    """The format of one package."""

    def detect(self, found: Found) -> bool:
        """Whether the files are in it, from names, headers, metadata and the JSON beside them."""
        ...

    def translate(self, found: Found) -> Translation:
        """What its tensors become: those of `quant.layouts`. Raises CheckpointError for what it does not understand."""
        ...


class Translation:
    """Collects, layer by layer, what the tensors of a checkpoint become."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self._recipes: dict[str, Made | str] = {}
        self._types: dict[str, str] = {}
        self._used: set[str] = set()

    def take(self, *names: str) -> None:
        """These tensors of the files are part of something else, or of no use."""
        self._used.update(names)

    def same(self, stored: str) -> Made:
        """The tensor `stored` as it is."""
        info = self.found.tensors[stored]
        return Made((stored,), lambda given: given[stored], info.dtype, info.shape)

    def swizzled(self, stored: str, n: int, groups: int) -> Made:
        """One-byte scales [n, groups] in the order that is written here: no shape of it is taken for another one."""
        dtype = "U8" if self.found.tensors[stored].dtype == "U8" else "F8_E4M3"
        return Made((stored,), lambda given: swizzle(given[stored].view(n, groups)), dtype, swizzled_shape(n, groups))

    def layer(self, layer: str, mm_type: str, leaves: Mapping[str, Made], n: int, k: int) -> None:
        """The linear `layer`, a weight [n, k], as `leaves` of `mm_type`.

        Where no codes are wanted they become floats.
        """
        self.take(*(need for made in leaves.values() for need in made.needs))
        wanted = self.found.wanted
        if wanted.quantized(layer) or (wanted.beyond and parse(mm_type).activation is not None):
            self._types[layer] = mm_type
            self._recipes |= {f"{layer}.{leaf}": made for leaf, made in leaves.items()}
        else:
            self._recipes[f"{layer}.weight"] = self._floats(layer, mm_type, leaves, n, k)

    def _floats(self, layer: str, mm_type: str, leaves: Mapping[str, Made], n: int, k: int) -> Made:
        spec = parse(mm_type).weight
        assert spec is not None

        def make(given: Given) -> Tensor:
            stored = {leaf: made.make(given) for leaf, made in leaves.items()}
            return float_weight(stored, spec, n, k, f"{self.found.where}: layer '{layer}'")

        needs = dict.fromkeys(need for made in leaves.values() for need in made.needs)
        return Made(tuple(needs), make, "F32", (n, k))

    def floats(self, layer: str, weight: Made) -> None:
        """The linear `layer` as the float `weight`: what no scheme here holds."""
        self.take(*weight.needs)
        self._recipes[f"{layer}.weight"] = weight

    def add(self, name: str, tensor: Made) -> None:
        """A tensor that belongs to no linear layer."""
        self.take(*tensor.needs)
        self._recipes[name] = tensor

    def rename(self, stored: str, name: str) -> None:
        """The tensor `stored` as it is, under another name."""
        self.take(stored)
        self._recipes[name] = stored

    def finish(self) -> Derived:
        """The checkpoint: all that was collected, and what nobody took as it is."""
        rest = {name: name for name in self.found.tensors if name not in self._used}
        return derive(self.found.checkpoint, {**rest, **self._recipes}, declare_layers(self._types))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), "is not a JSON object")
    return content
