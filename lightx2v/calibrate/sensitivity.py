"""How much a model's result changes when one layer is quantized, in every way that is considered.

A layer's own error is that of what the recipe makes of it (`variants`), on inputs that were seen. What it does to the
result is found in two steps that need one block in memory at a time: how much the block's output changes when the layer
alone is coarse, and how much of a change of that size behind this block is left, or has grown, behind the last one. For
the second the streams of all blocks are also run with every layer of one block coarse. Squared errors of layers are
taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.calibrate.trial import made_layer
from lightx2v.calibrate.variants import Variants
from lightx2v.calibrate.walk import BlockWalk, Part
from lightx2v.models.base import Stream

PROBES = 2
"""Forwards that changes are followed in; of the rest only the inputs of layers are looked at."""


@dataclass
class Sensitivity:
    """Relative squared errors: |change|^2 / |value|^2."""

    own: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each layer's results, by layer and mm_type."""
    reach: dict[str, float] = field(default_factory=dict)
    """By layer: squared change of the model's last stream, as a share of it, for each unit of the layer's own error."""

    def error(self, layer: str, mm_type: str) -> float:
        """What quantizing one layer does to the result."""
        return 0.0 if mm_type == "Default" else self.reach[layer] * self.own[layer][mm_type]


def measure(walk: BlockWalk, variants: Variants, coarse: str, done: Callable[[], None]) -> Sensitivity:
    """The sensitivity of every layer of `walk`, whose requests have been run, to each of the `variants`, made here too.

    `coarse` is the mm_type among them that changes are followed with; `done` is called after each block.
    """
    found = Sensitivity()
    behind: dict[str, float] = {}
    """By layer, the squared change behind its block for each unit of its own error."""
    followed: list[tuple[list[Stream], float, list[str]]] = []
    """For each block so far: the changed streams, the squared change behind the block, and its layers."""
    probes, last = walk.probes(PROBES), list[Stream]()
    for part, block in walk.blocks_run():
        local = [name.removeprefix(part.prefix) for name in walk.layers if name.startswith(part.prefix)]
        variants.solve(part)
        for one in local:
            name = part.prefix + one
            found.own[name] = {mm_type: variants.error(name, mm_type) ** 2 for mm_type in variants.schemes}
        coarse_layers = {one: _made(part, one, variants, coarse, walk.dtype) for one in local}
        exact = [block(index) for index in probes]
        for one in local:
            with exchanged(part.module, {one: coarse_layers[one]}):
                change = _change([block(index) for index in probes], exact)
            of_own = found.own[part.prefix + one][coarse]
            behind[part.prefix + one] = change / of_own if of_own else 0.0
        # What earlier blocks changed goes through this one.
        followed = [
            ([block(index, stream) for index, stream in zip(probes, streams, strict=True)], change, layers)
            for streams, change, layers in followed
        ]
        with exchanged(part.module, coarse_layers):
            changed = [block(index) for index in probes]
        followed.append((changed, _change(changed, exact), [part.prefix + one for one in local]))
        last = exact
        done()
    size = sum(_square(stream) for stream in last)
    for streams, change, layers in followed:
        growth = _change(streams, last) / change if change else 0.0
        for layer in layers:
            found.reach[layer] = behind[layer] * growth / size
    return found


def _made(part: Part, local: str, variants: Variants, mm_type: str, dtype: torch.dtype) -> nn.Module:
    """A layer of the part as one of the variants."""
    linear: Any = part.module.get_submodule(local)
    leaves = variants.leaves(part.prefix + local, mm_type)
    return made_layer(variants.schemes[mm_type], leaves, linear.bias, linear.weight, dtype, variants.device)


@contextmanager
def exchanged(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """`module` with other layers at these names for as long as the block lasts."""
    before = {name: module.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
        yield
    finally:
        for name, layer in before.items():
            module.set_submodule(name, layer)


def _tensors(stream: Stream) -> list[Tensor]:
    return [stream.x] if stream.txt is None else [stream.x, stream.txt]


def _square(stream: Stream) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in _tensors(stream))


def _change(changed: Sequence[Stream], exact: Sequence[Stream]) -> float:
    """The squared change of all streams."""
    total = 0.0
    for one, other in zip(changed, exact, strict=True):
        for a, b in zip(_tensors(one), _tensors(other), strict=True):
            total += float((a.double() - b.double()).square().sum())
    return total
