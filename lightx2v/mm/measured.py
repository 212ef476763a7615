"""Which library is fastest for a layer on this machine: measured once for each shape, and kept in the user's cache.

Only layers large enough to matter are measured, and only where more than one fast library can compute them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median

import torch
from loguru import logger
from torch import Tensor

import lightx2v
from lightx2v.mm.base import Packed
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo, list_devices, synchronize
from lightx2v.quant.formats import quantize_leaves
from lightx2v.tables import Table

ROWS = 512
"""Rows of the product that is timed: few enough to be quick, and enough that the order is that of longer sequences."""
SMALLEST = 1 << 20
"""Weights below which a layer is not worth measuring."""
NEAR = 1.1
"""Times that differ by less count as equal."""
_TABLE = Table("measured.json")
_REPEATS = 5
_SECONDS = 0.5
"""After so long no further turn is begun: a plan should not take long, and slow products vary little."""


def ranking(scheme: Scheme, libraries: Sequence[str], n: int, k: int, device: DeviceInfo) -> dict[str, float]:
    """Seconds that each of `libraries` takes for `scheme` and a weight [n, k], the one to take first.

    Empty where nothing is measured: one library only, a small layer, or a device of another machine.
    """
    rivals = [library for library in libraries if library != "reference"]
    if len(rivals) < 2 or n * k < SMALLEST or not _is_here(device):
        return {}
    table, key = _TABLE.read(), _key(scheme, n, k, device)
    known: dict[str, float] = table.setdefault(key, {})
    if missing := [library for library in rivals if library not in known]:
        logger.info("measuring {} for a weight of {}x{}, once: {}", ", ".join(missing), n, k, scheme.name)
        known |= _measure(scheme, missing, n, k, device)
        _TABLE.write(table)
    order = sorted((library for library in rivals if library in known), key=lambda library: known[library])
    # A choice that hangs on noise would change results from machine to machine: the usual order holds within a tenth.
    usual = next(library for library in rivals if known[library] <= NEAR * known[order[0]])
    return {library: known[library] for library in dict.fromkeys([usual, *order])}


def _key(scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str:
    numerics = scheme.with_library("reference").name
    versions = f"torch {torch.__version__}, lightx2v {lightx2v.__version__}, {torch.get_num_threads()} threads"
    return f"{device.kind} {device.name}, {versions}: {numerics} {n}x{k}"


@lru_cache(maxsize=8)
def _is_here(device: DeviceInfo) -> bool:
    return any((d.kind, d.index, d.name) == (device.kind, device.index, device.name) for d in list_devices())


def _measure(scheme: Scheme, libraries: Sequence[str], n: int, k: int, device: DeviceInfo) -> dict[str, float]:
    """Median seconds of each, taken in turns. A library that fails gets infinity, so that it is not tried again."""
    assert scheme.weight is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator).to(device.torch_name)
    x = torch.randn(ROWS, k, generator=generator).to(device.torch_name, torch.bfloat16)
    leaves = quantize_leaves(weight, scheme.weight)
    times: dict[str, list[float]] = {library: [] for library in libraries}
    runs: dict[str, Callable[[], object]] = {}
    for library in libraries:
        served = scheme.with_library(library)
        try:
            packed = LIBRARIES[library].prepare(served, leaves)
            run = _call(library, served, x, packed)
            run()
        except Exception as error:  # whatever a vendor's kernel raises, the others are still there
            logger.warning("{} failed while it was measured: {}", library, error)
            times[library].append(float("inf"))
        else:
            runs[library] = run
    deadline = time.perf_counter() + _SECONDS
    for repeat in range(_REPEATS):
        if repeat and time.perf_counter() > deadline:
            break
        for library, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            times[library].append(time.perf_counter() - start)
    return {library: median(seconds) for library, seconds in times.items()}


def _call(library: str, scheme: Scheme, x: Tensor, packed: Packed) -> Callable[[], object]:
    return lambda: LIBRARIES[library].linear(scheme, x, packed, None)
