"""LoRAs on a loaded model: branches beside its linears, and the exchange of all of it without loading it again."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightx2v.errors import ConfigError
from lightx2v.features.lora.plan import LoraPlan, Term
from lightx2v.features.lora.source import LoraSource, Values, load_terms, rows_of
from lightx2v.features.once import once_names
from lightx2v.mm.custom import CustomLinear
from lightx2v.mm.fused import FusedPart, exchange_whole
from lightx2v.mm.linear import ForceFP32Linear, QuantLinear
from lightx2v.mm.lowrank import LowRankLinear

Summand = tuple[int, Term]
"""The first output channel, of a layer that computes several, of the one that a term is for; and the term."""
RANK_STEP = 16
"""Branches have room for a multiple of so many ranks, so that LoRAs of similar ranks can take each other's place."""


@dataclass(eq=False)
class _Layer:
    """A linear that computes one named layer, or several whose weights have been put together."""

    names: dict[str, int]
    """The named layers, and the first output channel of each."""
    base: nn.Module
    parent: nn.Module
    attribute: str
    parts: list[FusedPart] = field(default_factory=list)
    branch: LowRankLinear | None = None

    def put(self, branch: LowRankLinear | None) -> None:
        """Compute with this branch from now on."""
        layer = self.base if branch is None else branch
        if self.parts:
            exchange_whole(self.parts, layer)
        else:
            setattr(self.parent, self.attribute, layer)
        self.branch = branch


class Loras:
    """The LoRAs of one loaded model: those of the plan of `source`, which it was loaded from.

    `dtype` is what the model computes in. With `uniform`, the branches in the same place of every block have one shape,
    so that one compiled graph serves all of them: where a LoRA leaves out a block, that gets a branch of zeros, and
    room that was made stays.
    """

    def __init__(self, source: LoraSource, dtype: torch.dtype, uniform: bool = False) -> None:
        self.source, self.dtype, self.uniform = source, dtype, uniform
        self._owners: dict[str, nn.Module] = {}
        self._layers: dict[str, _Layer] = {}
        self._once: set[str] = set()

    @property
    def plan(self) -> LoraPlan:
        return self.source.plan

    def attach(self, module: nn.Module) -> None:
        """Put branches on `module`: the model, or a part of it in which layers have the names that they have there.

        After its weights are loaded and its projections fused, before it is offloaded or compiled.
        """
        self._owners |= {name: owner for name, owner in module.named_modules() if owner._parameters}
        self._once.update(once_names(module) if hasattr(module, "once") else ())
        layers = list(_layers(module))
        self._layers |= {name: layer for layer in layers for name in layer.names}
        self._branch(layers)

    @torch.inference_mode()
    def switch(self, plan: LoraPlan) -> bool:
        """Exchange the LoRAs for those of `plan`, between requests. The result is that of a model loaded with it.

        Branches take the memory of those that were there, if they have room. What was added to weights is undone by
        reading these from the checkpoint again. True when modules were exchanged: graphs that were recorded before
        are void then, and a compiled model compiles once more if it has not had this form yet. Raises ConfigError,
        and changes nothing, for weights that cannot be changed where they are.
        """
        changed = {*self.plan.added, *plan.added}
        self._check(changed)
        self.source.plan = plan
        if changed:
            for name, tensor in self.source.read(changed):
                if not (held := self._held(name)).is_meta:  # else it is read when it is needed
                    held.copy_(tensor)
        return self._branch(list(dict.fromkeys(self._layers.values())))

    def detach(self) -> bool:
        """Back to the plain model, bit for bit."""
        return self.switch(LoraPlan())

    def _check(self, names: Collection[str]) -> None:
        for name in names:
            layer, _, leaf = name.rpartition(".")
            base = self._layers[layer].base if layer in self._layers else None
            if not (base is None or isinstance(base, nn.Linear) or (isinstance(base, QuantLinear) and leaf == "bias")):
                raise ConfigError(
                    "lora_dynamic", f"is false, so that '{name}' was packed with its LoRA", do="set it to true"
                )
            if self._held(name).is_meta and name not in self._once:
                raise ConfigError(
                    "lora", f"'{name}' stays on disk (lazy_load), where it cannot be changed", do="load the model anew"
                )

    def _held(self, name: str) -> Tensor:
        """The tensor, or the rows of one, that the model has under the name `name`."""
        owner, _, leaf = name.rpartition(".")
        layer = self._layers.get(owner)
        tensor: Tensor = getattr(self._owners[owner] if layer is None else layer.base, leaf)
        if layer is None or not layer.parts:
            return tensor
        part = next(part for part in layer.parts if part.start == layer.names[owner])
        return tensor[part.start : part.start + part.out_features]

    def _branch(self, layers: Sequence[_Layer]) -> bool:
        """Give each layer the branch that the plan has for it. True when modules were exchanged."""
        terms = {name: terms for layer in layers for name in layer.names if (terms := self.plan.beside.get(name))}
        values = load_terms(term for of_name in terms.values() for term in of_name)
        changed = False
        for layer in layers:
            room = self._room(layer)
            if layer.branch is not None and not room:
                layer.put(None)
                changed = True
            if not room:
                continue
            if layer.branch is None or layer.branch.rank < room:
                layer.put(self._made(layer, room))
                changed = True
            assert layer.branch is not None
            summands = [(start, term) for name, start in layer.names.items() for term in terms.get(name, ())]
            _fill(layer.branch, *_factors(layer.branch, summands, values), self.source.device)
        return changed

    def _room(self, layer: _Layer) -> int:
        """Ranks that the branch of a layer is to have room for."""
        if not self.plan.beside:
            return 0
        blocks: list[Iterable[str]] = [layer.names]
        if self.uniform:
            places = {_place(name) for name in layer.names}
            found: dict[str, set[str]] = {}
            for name in self.plan.beside:
                if _place(name) in places:
                    found.setdefault(_number(name), set()).add(name)
            blocks = [*found.values()]
        ranks = [sum(term.delta.rank for name in names for term in self.plan.beside.get(name, ())) for names in blocks]
        room = math.ceil(max(ranks, default=0) / RANK_STEP) * RANK_STEP
        return max(room, layer.branch.rank) if self.uniform and layer.branch is not None else room

    def _made(self, layer: _Layer, rank: int) -> LowRankLinear:
        own = next(layer.base.parameters(), None)
        is_float = isinstance(layer.base, nn.Linear) and not isinstance(layer.base, ForceFP32Linear)
        return LowRankLinear(
            layer.base,
            self.plan.linears[next(iter(layer.names))][1],
            sum(self.plan.linears[name][0] for name in layer.names),
            rank,
            device=self.source.device,
            dtype=own.dtype if is_float and own is not None else self.dtype,
        )


def _place(name: str) -> str:
    """The name of a layer without the number of its block."""
    return re.sub(r"\d+", "*", name, count=1)


def _number(name: str) -> str:
    """The number of the block of a layer."""
    match = re.search(r"\d+", name)
    return match[0] if match else ""


def _layers(model: nn.Module, prefix: str = "") -> Iterator[_Layer]:
    """Every linear of a model in which none has a branch yet."""
    fused: dict[int, _Layer] = {}
    for attribute, child in model.named_children():
        name = f"{prefix}{attribute}"
        if isinstance(child, FusedPart):
            if id(child.of) not in fused:
                fused[id(child.of)] = _Layer({}, child.of, model, attribute)
            fused[id(child.of)].names[name] = child.start
            fused[id(child.of)].parts.append(child)
        elif isinstance(child, nn.Linear | QuantLinear | CustomLinear):
            yield _Layer({name: 0}, child, model, attribute)
        else:
            yield from _layers(child, f"{name}.")
    yield from fused.values()


def _factors(branch: LowRankLinear, summands: Sequence[Summand], values: Values) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] in float32 of which B A is the sum of the terms."""
    downs, ups = [torch.empty(0, branch.in_features)], [torch.empty(branch.out_features, 0)]
    for start, term in summands:
        delta = term.delta
        assert delta.down is not None
        down, scaled = values[term.lora][delta.down.name].float(), rows_of(term, values).float() * term.scale
        down, scaled = down.flatten(1), scaled.flatten(1)  # of a convolution over single points
        shift = _balance(down, scaled)
        up = torch.zeros(branch.out_features, delta.rank)
        up[start + delta.start : start + delta.stop] = scaled * shift
        downs.append(down / shift)
        ups.append(up)
    return torch.cat(downs), torch.cat(ups, dim=1)


def _balance(down: Tensor, up: Tensor) -> float:
    """A power of two between the sizes of both, so that neither has the tiny values that float16 rounds coarsely."""
    sizes = [float(factor.abs().max()) for factor in (down, up)]
    return 2.0 ** round(math.log2(sizes[0] / sizes[1]) / 2) if all(0 < size < math.inf for size in sizes) else 1.0


@torch.inference_mode()
def _fill(branch: LowRankLinear, down: Tensor, up: Tensor, device: torch.device) -> None:
    """Set A [r, K] and B [N, r], r <= R, in place, so that what holds on to the tensors sees the new values."""
    rank = down.shape[0]
    if branch.down.is_meta:  # offloaded to disk, where nothing is changed: from now on it stays on the device
        with torch.inference_mode(False):
            branch.down, branch.up = (torch.empty_like(held, device=device) for held in (branch.down, branch.up))
    branch.down[:rank].copy_(down)
    branch.up[:, :rank].copy_(up)
    branch.down[rank:].zero_()
    branch.up[:, rank:].zero_()
