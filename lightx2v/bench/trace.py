"""Where the time of a forward pass goes: linears, attention, quantization, elementwise work, copies, and gaps between.

Kernels are told apart by their names: this engine's own, those of torch, cuBLAS, CUTLASS, FlashAttention and oneDNN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from lightx2v.platform import DeviceInfo

KINDS = {
    "attention": re.compile(r"attend_kernel|attention|flash|fmha|sdpa|(scores|values|channels|spread)_kernel", re.I),
    "quantization": re.compile(r"^_?(tokens|groups)$|quant", re.I),
    "linears": re.compile(r"gemm|mm$|addmm|scaled_mm|_int_mm|linear|cutlass|matmul|nvjet", re.I),
    "copies": re.compile(r"memcpy|memset|copy_", re.I),
}
"""The first that a name matches; what matches none is elementwise."""
_TRANSFER = re.compile(r"memcpy htod", re.I)
"""A copy from host memory, as the profiler calls it: weights that are offloaded."""


class Piece(NamedTuple):
    """One kernel, or one operator of a CPU without what it calls; microseconds."""

    name: str
    start: float
    length: float


def kind_of(name: str) -> str:
    """One of KINDS, or "elementwise"."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "elementwise")


def shares(pieces: Iterable[Piece]) -> dict[str, float]:
    """Seconds of each kind, and of "gaps": the time from the first start to the last end in which nothing ran."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    found = dict.fromkeys((*KINDS, "elementwise", "gaps"), 0.0)
    end = ordered[0].start if ordered else 0.0
    for piece in ordered:
        found[kind_of(piece.name)] += piece.length / 1e6
        found["gaps"] += max(0.0, piece.start - end) / 1e6
        end = max(end, piece.start + piece.length)
    return found


class Transfers(NamedTuple):
    """Seconds in which copies from host memory ran, and those of them in which something else ran as well."""

    seconds: float
    hidden: float


def transfers(pieces: Iterable[Piece]) -> Transfers:
    """How much of the copies from host memory lies beside other work of the device."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    copies = _merged(piece for piece in ordered if _TRANSFER.search(piece.name))
    others = _merged(piece for piece in ordered if not _TRANSFER.search(piece.name))
    hidden, at = 0.0, 0
    for start, end in copies:
        while at < len(others) and others[at][1] <= start:
            at += 1
        for first, last in others[at:]:
            if first >= end:
                break
            hidden += min(end, last) - max(start, first)
    return Transfers(sum(end - start for start, end in copies) / 1e6, hidden / 1e6)


def _merged(ordered: Iterable[Piece]) -> list[tuple[float, float]]:
    """Starts and ends of the stretches in which any of the pieces ran."""
    found: list[tuple[float, float]] = []
    for piece in ordered:
        end = piece.start + piece.length
        if found and piece.start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((piece.start, end))
    return found


def trace(work: Callable[[], object], device: DeviceInfo) -> dict[str, float]:
    """Seconds of one call of `work` by kind. On a CPU there are no gaps: an operator's own time is counted.

    Where copies came from host memory, "from the host" are the seconds of those, and "of that beside work" the seconds
    in which other work hid them.
    """
    from torch.profiler import ProfilerActivity, profile

    on_cpu = device.kind == "cpu"
    activities = [ProfilerActivity.CPU]
    activities += [
        each for each in torch.profiler.supported_activities() if each != ProfilerActivity.CPU and not on_cpu
    ]
    with profile(activities=activities) as profiler:
        work()
    if on_cpu:
        own = [Piece(each.key, 0.0, each.self_cpu_time_total) for each in profiler.key_averages()]
        return {**shares(own), "gaps": 0.0}
    kernels = (each for each in profiler.events() if each.device_type != torch.autograd.DeviceType.CPU)
    pieces = [Piece(each.name, each.time_range.start, each.time_range.elapsed_us()) for each in kernels]
    moved = transfers(pieces)
    apart = {"from the host": moved.seconds, "of that beside work": moved.hidden} if moved.seconds else {}
    return {**shares(pieces), **apart}
