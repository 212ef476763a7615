"""The arithmetic of a conversion, on a slab of rows of one tensor at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lightx2v.convert.opened import open_rows
from lightx2v.convert.planning import Item, Plan
from lightx2v.errors import CheckpointError
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.platform import DeviceInfo
from lightx2v.quant.formats import needs_amax, quantize_leaves, rows_of, rows_together, written_leaves

SLAB_ELEMENTS = {"cpu": 1 << 19, "accelerator": 1 << 24}
"""Elements of a tensor that are converted at a time; few on a CPU, so that they stay in its caches."""
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Rows [start, stop) of one tensor."""

    item: Item
    start: int
    stop: int


class Runner(Protocol):
    """Runs a function on jobs, several at once, and yields what it returns in their order."""

    def __call__(self, job: Callable[[Job], T], jobs: Iterable[Job], /) -> Iterator[T]: ...


class Converter:
    """Source rows, plus LoRA, in float32, as codes and scales or in the dtype of the output."""

    def __init__(self, plan: Plan, device: DeviceInfo) -> None:
        self.reader, self.device = open_rows(plan.checkpoint), device
        self.slab = SLAB_ELEMENTS["cpu" if device.kind == "cpu" else "accelerator"]
        self._lock = threading.Lock()
        self._amax_locks: dict[str, threading.Lock] = {}
        self._amax: dict[str, float] = {}

    def jobs(self, items: Iterable[Item]) -> Iterator[Job]:
        """All rows of all tensors, in slabs."""
        for item in items:
            shape = item.source.shape
            rows = shape[0] if shape else 1
            width = max(1, item.source.nbytes // TORCH_DTYPES[item.source.dtype].itemsize // max(1, rows))
            unit = rows_together(item.spec) if item.spec else 1
            step = max(1, self.slab // width // unit) * unit
            for start in range(0, rows, step):
                yield Job(item, start, min(rows, start + step))

    def values(self, job: Job) -> Tensor:
        """The rows as they are to be stored or quantized: float32 where something is added or quantized."""
        item = job.item
        ranges = item.ranges(job.start, job.stop)
        read = [self.reader.rows(item.source.name, start, stop) for start, stop in ranges]
        rows = (read[0] if len(read) == 1 else torch.cat(read)).to(self.device.torch_name)
        if item.spec or item.patches:
            rows = rows.to(torch.float32, copy=True) if item.patches else rows.float()
            first = 0
            for start, stop in ranges if item.patches else ():
                for patch in item.patches:
                    patch.add(rows[first : first + stop - start], start, stop)
                first += stop - start
        return rows

    def convert(self, job: Job) -> dict[str, tuple[Tensor, int]]:
        """Each leaf that these rows make, and the first row where it goes.

        Raises CheckpointError, which names the tensor, for a value that is not finite.
        """
        item, values = job.item, self.values(job)
        if item.spec:
            made = quantize_leaves(values, item.spec, self._largest(item) if needs_amax(item.spec) else None)
            _check_finite(item, made["weight_scale"], values)
            leaves = {}
            for leaf, tensor in written_leaves(made, item.spec).items():
                rows = rows_of(leaf, item.spec, job.start, job.stop)
                if rows is not None or job.start == 0:
                    leaves[leaf] = (tensor.cpu(), rows[0] if rows else 0)
            return leaves
        weight = values.to(TORCH_DTYPES[item.weight.dtype])
        if weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
            _check_finite(item, weight, values)
        return {"weight": (weight.cpu(), job.start)}

    def _largest(self, item: Item) -> Tensor:
        """The largest absolute value of a whole tensor, found slab by slab before its first rows are quantized."""
        name = item.weight.name
        with self._lock:
            lock = self._amax_locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._amax:
                self._amax[name] = max(self._largest_of(job) for job in self.jobs([item]))
        return torch.tensor(self._amax[name], device=self.device.torch_name)

    def _largest_of(self, job: Job) -> float:
        values = self.values(job)
        largest = values.abs().amax()
        _check_finite(job.item, largest, values)
        return float(largest)


def _check_finite(item: Item, result: Tensor, values: Tensor) -> None:
    if bool(torch.isfinite(result.float()).all()):
        return
    where, name = str(item.source.file), item.source.name
    if bool(torch.isfinite(values).all()):
        largest = float(values.abs().max())
        raise CheckpointError(
            where,
            f"tensor '{name}' has a value of {largest:.3g}, which {item.weight.dtype} cannot hold",
            do="use --non_linear_dtype torch.float32 or torch.bfloat16",
        )
    what = "after the LoRA " if item.patches else ""
    raise CheckpointError(
        where, f"tensor '{name}' has NaN or infinite values {what}".rstrip(), do="mend the checkpoint"
    )
