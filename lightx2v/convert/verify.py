"""Compares what was written, read back from disk, with the source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightx2v.convert.planning import Plan
from lightx2v.convert.slabs import Converter, Job, Runner
from lightx2v.convert.source import RowReader
from lightx2v.io.dtypes import TORCH_DTYPES
from lightx2v.io.weights import Checkpoint
from lightx2v.quant.formats import dequantize_leaves, read_leaves, rows_of

BOUNDS = {"int8": 0.02, "fp8": 0.05, "mxfp8": 0.05, "mxfp6": 0.1, "mxfp4": 0.25, "nvfp4": 0.2, "int4": 0.25}
"""Largest relative error of a layer.

int8: rounding to steps of amax / 127 has an error of step / sqrt(12) = amax / 440, so a row reaches 2 % when its
largest weight is 8.8 times its root mean square (a normal distribution: 4 times, 0.9 %).
fp8, mxfp8: 3 bits of mantissa put each weight within 1/16 of itself, and about 2.6 % off in the mean: 5 % is not
rounding. mxfp6: 2 bits, within 1/8, about 5.3 %. mxfp4, nvfp4: 1 bit, within 1/4, about 11.5 % and 9.5 %, and small
ones become 0. int4: steps of amax / 7 have an error of amax / 24, so a layer reaches 25 % when the largest weight of
its groups of 128 is 6 times the root mean square (a normal distribution: 2.7 times, 11 %).
"""


@dataclass(frozen=True)
class LayerError:
    """The error of one tensor: norm(output - source) / norm(source), and the most that its format explains."""

    name: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound


def verify(plan: Plan, converter: Converter, run: Runner, report: Callable[[int], object]) -> list[LayerError]:
    """The error of every tensor, the worst first. What is not quantized has to be equal.

    `report` is told the bytes of each step.
    """
    written = RowReader(Checkpoint.open(plan.result))
    sums: dict[str, tuple[float, float]] = {}

    def compare(job: Job) -> tuple[Job, float, float]:
        return (job, *_compare(job, converter, written))

    for job, difference, norm in run(compare, converter.jobs(plan.items)):
        name = job.item.weight.name
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + difference, before[1] + norm
        report((job.stop - job.start) * job.item.weight.row_bytes)
    errors = []
    for item in plan.items:
        difference, norm = sums.get(item.weight.name, (0.0, 0.0))
        bound = BOUNDS[item.spec.dtype] if item.spec else 0.0
        errors.append(LayerError(item.weight.name, (difference / (norm or 1.0)) ** 0.5, bound))
    return sorted(errors, key=lambda error: (error.good, -error.error))


def _compare(job: Job, converter: Converter, written: RowReader) -> tuple[float, float]:
    """Sums of squares of the difference and of the source."""
    item, source = job.item, converter.values(job)
    got = written.rows(item.weight.name, job.start, job.stop).to(source.device)
    if item.spec:
        leaves = {"weight": got}
        for leaf, slot in item.scales.items():
            rows = rows_of(leaf, item.spec, job.start, job.stop)
            leaves[leaf] = written.rows(slot.name, *(rows or ())).to(source.device)
        size = (job.stop - job.start, source.shape[1])
        got = dequantize_leaves(read_leaves(leaves, item.spec, *size, item.layer), item.spec)[:, : size[1]]
    else:
        source = source.to(TORCH_DTYPES[item.weight.dtype])
    return _square(got.double() - source.double()), _square(source.double())


def _square(values: torch.Tensor) -> float:
    return float(values.square().sum())
