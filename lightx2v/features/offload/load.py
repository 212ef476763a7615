"""A DiT built block by block, each taken off the device before the next is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lightx2v.config.features import OffloadConfig
from lightx2v.features.offload.attach import Offloaded, Parked, Streamed, allocate, methods
from lightx2v.features.offload.disk import DiskStore
from lightx2v.features.offload.slab import Entry, Slab
from lightx2v.features.offload.store import HostStore
from lightx2v.features.once import once_parts
from lightx2v.io.source import FileSpan, Source
from lightx2v.io.weights import stream_into
from lightx2v.mm.fused import FusedPart, fuse_projections
from lightx2v.platform import CopyQueue, DeviceInfo, trim_memory

GIB = 1024**3
PART = 0.02
"""Share of a block's bytes from which on one of its children is a unit of its own; smaller ones stay on the device."""


def load_offloaded(
    dit: nn.Module,
    source: Source,
    settings: OffloadConfig,
    *,
    device: DeviceInfo,
    dtype_of: Callable[[str], torch.dtype],
    where: str,
    keep_first: int = 0,
    ready: Callable[[nn.Module], None] | None = None,
) -> Offloaded:
    """Fill a meta `dit` from `source`, fuse its projections, and keep its weights as `settings` say.

    Each layer is packed on `device`, for its library, before it is taken off. `keep_first` blocks stay there, for a
    cache that computes them at every step. `ready` is called with each part of the model once it is filled and fused,
    before it is taken off: first what is outside the blocks, then each block within modules that give it the name that
    it has in the model. Arguments and errors otherwise as `io.weights.stream_into`.
    """
    blocks: Sequence[nn.Module] = list(cast(Any, dit).blocks)
    # Nothing here may hold the modules inside the blocks: those that are fused are freed one block after the other.
    names = {module: name for name, module in dit.named_modules() if module in blocks}
    prefixes = [names[block] for block in blocks]
    queue = CopyQueue(device)
    whole = Parked([], device) if settings.granularity == "model" else None
    tight = settings.lazy_load and device.kind == "cpu"
    streamed = Streamed(device, queue, _store(dit, source, settings, device, queue), tight)
    away = set(range(len(blocks))) if whole else set(spread(len(blocks), settings.ratio, keep_first))

    def fill(module: nn.Module, wanted: Collection[str]) -> None:
        torch_device = torch.device(device.torch_name)
        stream_into(module, source.read(wanted), device=torch_device, dtype_of=dtype_of, where=where)
        fuse_projections(module)
        if ready is not None:
            ready(module)

    with _without(dit, blocks):
        fill(dit, [name for name in source.names if not name.startswith(tuple(f"{p}." for p in prefixes))])
        if whole:
            whole.add(Slab.of([("", dit)], without=list(once_parts(dit).values())))
    for index, (prefix, block) in enumerate(zip(prefixes, blocks, strict=True)):
        fill(_nested(prefix, block), [name for name in source.names if name.startswith(f"{prefix}.")])
        if whole:
            whole.add(Slab.of([(prefix, block)]))
        elif index in away and settings.granularity == "block":
            streamed.guard(block, streamed.add(Slab.of([(prefix, block)])))
        else:
            parts = list(phases(prefix, block)) if index in away else []
            for name, part in parts:
                unit = streamed.add(Slab.of([(name, part)]))
                for module in part.modules():
                    streamed.guard(module, unit, methods(module))
            _settle(Slab.of([(prefix, block)], without=[part for _, part in parts]), device)
        trim_memory()
    if settings.granularity == "block" and 0 in away and not cast(Any, dit).time_signal:
        streamed.guard(dit, 0, ("signal",))  # it reads the first block
    return whole or streamed


def spread(count: int, ratio: float, keep_first: int = 0) -> list[int]:
    """Which of `count` blocks are offloaded when `ratio` of them are, evenly, but none of the first `keep_first`."""
    free = max(count - keep_first, 0)
    wanted = min(round(count * ratio), free)
    return [keep_first + i for i in range(free) if (i + 1) * wanted // free > i * wanted // free]


def children(prefix: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a block by full name: its children, and the members of lists, which are never called themselves."""
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from children(f"{prefix}.{name}", child)
        else:
            yield f"{prefix}.{name}", child


def phases(prefix: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that are large enough to be units."""
    whole = Slab.of([(prefix, block)]).nbytes
    for name, child in children(prefix, block):
        if Slab.of([(name, child)]).nbytes > PART * whole:
            yield name, child


def _settle(slab: Slab, device: DeviceInfo) -> None:
    """Put tensors that stay on the device into a slab, too: to a compiled block they are like those of the others."""
    memory = allocate(slab.nbytes, device)
    slab.pack(memory)
    slab.bind(slab.views(memory))


def _store(
    dit: nn.Module, source: Source, settings: OffloadConfig, device: DeviceInfo, queue: CopyQueue
) -> HostStore | DiskStore:
    if not settings.lazy_load:
        return HostStore(device, queue)
    keep = int((settings.max_memory_gb or 0) * GIB)
    return DiskStore(device, queue, lambda entry: _spans(dit, entry, source), settings.workers, keep)


def _spans(dit: nn.Module, entry: Entry, source: Source) -> list[FileSpan]:
    """Where the checkpoint might have the bytes of a tensor: under its own name, or under those of fused layers."""
    layer, _, leaf = entry.name.rpartition(".")
    if layer.endswith(".packed"):
        layer, leaf = layer.removesuffix(".packed"), {"scale": "weight_scale"}.get(leaf, leaf)
    layer = layer.removesuffix(".base")
    layers = [layer]
    if layer.endswith(".whole"):
        parent, _, first = layer.removesuffix(".whole").rpartition(".")
        of = cast(FusedPart, dit.get_submodule(f"{parent}.{first}")).of
        parts = [
            (n, m) for n, m in dit.get_submodule(parent).named_children() if isinstance(m, FusedPart) and m.of is of
        ]
        layers = [f"{parent}.{name}" for name, _ in sorted(parts, key=lambda part: part[1].start)]
    spans = [source.locate(f"{name}.{leaf}") for name in layers]
    return [span for span in spans if span is not None] if all(spans) else []


@contextmanager
def _without(dit: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """`dit` as if it had no blocks."""
    places = [
        (parent, key, child) for parent in dit.modules() for key, child in parent.named_children() if child in blocks
    ]
    for parent, key, _ in places:
        parent._modules[key] = None
    try:
        yield
    finally:
        for parent, key, child in places:
            parent._modules[key] = child


def _nested(prefix: str, block: nn.Module) -> nn.Module:
    """A module in which `block` has the name that it has in its model."""
    for key in reversed(prefix.split(".")):
        outer = nn.Module()
        outer.add_module(key, block)
        block = outer
    return block
