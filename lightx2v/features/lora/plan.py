"""What LoRAs do to a model, decided from the headers of their files: which tensors they change, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.features.once import once_names
from lightx2v.io.lora import Delta, LoraFile, Place, read_lora, tensor_names

Aliases = Callable[[str, tuple[int, ...]], Iterable[tuple[str, tuple[str, int, int | None, int]]]]
"""From a model's tensor and its shape to its names in other layouts, each with the fields of a `Place`."""


class LoraRequest(Protocol):
    """One LoRA as the configuration names it."""

    @property
    def path(self) -> str: ...
    @property
    def strength(self) -> float: ...
    @property
    def name(self) -> str | None: ...
    @property
    def alpha(self) -> float | None: ...


@dataclass(frozen=True, eq=False)
class Lora:
    """One LoRA, checked against the model."""

    name: str
    path: Path
    strength: float
    file: LoraFile

    def load(self, deltas: Collection[Delta]) -> dict[str, Tensor]:
        """The tensors of `deltas` by their names in the file, as copies in the host's memory."""
        names = {info.name for delta in deltas for info in (delta.up, delta.down) if info is not None}
        return {name: tensor.clone() for name, tensor in self.file.checkpoint.stream(names)} if names else {}


@dataclass(frozen=True, slots=True)
class Term:
    """A summand of one tensor: a delta of one LoRA, times its strength."""

    lora: Lora
    delta: Delta

    @property
    def scale(self) -> float:
        return self.lora.strength * self.delta.scale


Terms = Mapping[str, tuple[Term, ...]]


@dataclass(frozen=True, eq=False)
class LoraPlan:
    """The LoRAs of a model. Without any, it is the plain model."""

    loras: tuple[Lora, ...] = ()
    added: Terms = field(default_factory=dict)
    """By tensor: what is added to it as it loads."""
    beside: Terms = field(default_factory=dict)
    """By linear layer: what is computed beside it."""
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(N, K) of every linear of the model."""

    def __bool__(self) -> bool:
        return bool(self.loras)

    def branch_bytes(self, itemsize: int) -> int:
        """Bytes that the branches take on the device, in a dtype of so many bytes."""
        terms = (term.delta for terms in self.beside.values() for term in terms)
        numbers = sum((d.stop - d.start) * d.rank + math.prod(d.down.shape) for d in terms if d.down is not None)
        return numbers * itemsize

    def to_json(self) -> list[dict[str, Any]]:
        """Each LoRA with what it changes, as plain data for `explain` and the plan's hash."""
        return [
            {
                "name": lora.name,
                "path": str(lora.path),
                "strength": lora.strength,
                "rank": max((delta.rank for delta in lora.file.deltas), default=0),
                "added": sum(term.lora is lora for terms in self.added.values() for term in terms),
                "beside": sum(term.lora is lora for terms in self.beside.values() for term in terms),
            }
            for lora in self.loras
        ]


def plan_loras(
    requests: Sequence[LoraRequest],
    module: nn.Module,
    aliases: Aliases,
    *,
    dynamic: bool | None = None,
    quantized: Collection[str] = (),
    stored: Collection[str] = (),
    folded: Collection[str] = (),
) -> LoraPlan:
    """Match LoRAs with the tensors of `module`, a DiT on meta with plain linears. Reads headers and alphas only.

    `quantized` are the layers that are not computed as plain floats, `stored` those whose checkpoint holds codes,
    `folded` those whose weights a multiplier has changed. With `dynamic` a low-rank change of a linear is computed
    beside it, without it added to its weight; None: added where the layer is not quantized. Everything else, and parts
    that are read once per request, is added. A strength of 0 does nothing.
    Raises CheckpointError for a file that does not fit the model, ConfigError for what cannot be done with it.
    """
    parameters = dict(module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    names = tensor_names(_named(shapes, aliases))
    linears = {
        name: (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    once = {name.rpartition(".")[0] for name in once_names(module)} if hasattr(module, "once") else set()
    loras = tuple(_open(request, names, shapes) for request in requests)
    _refuse_same_names(loras)
    added: dict[str, tuple[Term, ...]] = {}
    beside: dict[str, tuple[Term, ...]] = {}
    for lora in loras:
        for delta in lora.file.deltas if lora.strength else ():
            layer, _, leaf = delta.target.rpartition(".")
            if layer in folded:
                raise CheckpointError(
                    str(lora.path),
                    f"changes '{layer}', whose weights hold a multiplier that was folded when the model was calibrated",
                    do="calibrate with calibration.fold false, or with the LoRA added to the model",
                )
            is_weight = leaf == "weight" and layer in linears
            if is_weight and delta.down is not None and layer not in once and _is_beside(layer, dynamic, quantized):
                beside[layer] = (*beside.get(layer, ()), Term(lora, delta))
                continue
            if is_weight and layer in stored:
                raise _not_addable(lora, delta)
            added[delta.target] = (*added.get(delta.target, ()), Term(lora, delta))
    return LoraPlan(loras, added, beside, linears)


def _named(shapes: Mapping[str, tuple[int, ...]], aliases: Aliases) -> Iterator[tuple[str, Place]]:
    for name, shape in shapes.items():
        yield name, Place(name)
        yield from ((alias, Place(*place)) for alias, place in aliases(name, shape))


def _open(request: LoraRequest, names: Mapping[str, tuple[Place, ...]], shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    path = Path(request.path)
    if not math.isfinite(request.strength):
        raise ConfigError("lora", f"the strength of {path} is {request.strength}", allowed="a finite number")
    return Lora(request.name or path.stem, path, request.strength, read_lora(path, names, shapes, request.alpha))


def _refuse_same_names(loras: Sequence[Lora]) -> None:
    for lora in loras:
        if [other.name for other in loras].count(lora.name) > 1:
            raise ConfigError("lora", f"two are called '{lora.name}'", do="give each a 'name' of its own")


def _is_beside(layer: str, dynamic: bool | None, quantized: Collection[str]) -> bool:
    return layer in quantized if dynamic is None else dynamic


def _not_addable(lora: Lora, delta: Delta) -> Exception:
    what = f"'{delta.up.name}' cannot be added to '{delta.target}', which the checkpoint holds quantized"
    if delta.down is None:
        return CheckpointError(
            str(lora.path),
            what,
            do="it is a full difference: add it with lightx2v convert --lora_path before quantizing, or load the "
            "unquantized checkpoint with weight_auto_quant",
        )
    return ConfigError("lora_dynamic", f"is false, but {what}", do="set it to true, or leave it out")
