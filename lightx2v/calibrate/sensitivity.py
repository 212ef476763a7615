"""How much a model's result changes when one layer is quantized, in every way that is considered.

A layer's own error is measured on inputs that were seen. What it does to the result is found in two steps that need one
block in memory at a time: how much the block's output changes when the layer alone is as coarse as it may become, and
how much of a change of that size behind this block is left, or has grown, behind the last one. For the second the
streams of all blocks are also run with every layer of one block coarse. Squared errors of layers are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightx2v.calibrate.solve import plain_leaves
from lightx2v.calibrate.trial import made_layer, output_error
from lightx2v.calibrate.walk import BlockWalk
from lightx2v.calibrate.watch import Wants, Watch, shared_inputs
from lightx2v.mm.scheme import Scheme
from lightx2v.models.base import Stream
from lightx2v.platform import DeviceInfo

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


def measure(
    walk: BlockWalk, schemes: Mapping[str, Scheme], coarse: str, rows: int, device: DeviceInfo, done: Callable[[], None]
) -> Sensitivity:
    """The sensitivity of every layer of `walk`, whose requests have been run, to `schemes` by mm_type.

    `coarse` is the one of them that changes are followed with; `done` is called after each block.
    """
    found = Sensitivity()
    behind: dict[str, float] = {}
    """By layer, the squared change behind its block for each unit of its own error."""
    followed: list[tuple[list[Stream], float, list[str]]] = []
    """For each block so far: the changed streams, the squared change behind the block, and its layers."""
    probes, last = walk.probes(PROBES), list[Stream]()
    for part, block in walk.blocks_run():
        local = [name.removeprefix(part.prefix) for name in walk.layers if name.startswith(part.prefix)]
        seen = Watch(shared_inputs(part.module, local), Wants(rows=rows))
        with seen.attached(part.module):
            part.run(seen.at)
        linears: dict[str, Any] = {name: part.module.get_submodule(name) for name in local}
        coarse_layers: dict[str, nn.Module] = {}
        for name, members in seen.groups.items():
            sample = seen.total(name).sample
            assert sample is not None
            for one in members:
                weight = linears[one].weight.detach().float()
                own = found.own[part.prefix + one] = {}
                for mm_type, scheme in schemes.items():
                    leaves = plain_leaves(scheme, weight, sample.rows)
                    own[mm_type] = output_error(scheme, leaves, weight, sample.rows, device) ** 2
                    if mm_type == coarse:
                        coarse_layers[one] = made_layer(scheme, leaves, linears[one].bias, weight, walk.dtype, device)
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
