"""Compares what was written, read back from disk, with the source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightx2v.convert.planning import Plan
from lightx2v.convert.source import RowReader
from lightx2v.convert.writer import TORCH_DTYPES
from lightx2v.io.weights import Checkpoint
from lightx2v.quant.numerics import dequantize_weight

if TYPE_CHECKING:
    from lightx2v.convert.run import Converter

BOUNDS = {"int8": 0.02, "fp8": 0.05}
"""Largest relative error of a layer.

int8: rounding to steps of amax / 127 has an error of step / sqrt(12), which is amax / 440; 2 % of the weights' root mean
square is reached when the largest weight of a row is 8.8 times it (4 times in a normal distribution: 0.9 %).
fp8: 3 bits of mantissa put each weight within 1/16 of itself, and within 2.6 % of it in the mean: above 5 % it is not
rounding.
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


def verify(plan: Plan, converter: Converter) -> list[LayerError]:
    """The error of every tensor, the worst (relative to its bound) first. What is not quantized has to be equal."""
    written = RowReader(Checkpoint.open(plan.result))
    errors = []
    for item in plan.items:
        difference = norm = 0.0
        for job in converter.jobs([item]):
            source = converter.values(job)
            got = written.rows(item.weight.name, job.start, job.stop).to(source.device)
            if item.spec and item.scale:
                first, last = _scale_rows(item.spec.size, job.start, job.stop)
                scale = written.rows(item.scale.name, first, last).to(source.device)
                got = dequantize_weight(got, scale, item.spec)
            else:
                source = source.to(TORCH_DTYPES[item.weight.dtype])
            difference += _square(got.double() - source.double())
            norm += _square(source.double())
        bound = BOUNDS[item.spec.dtype] if item.spec else 0.0
        errors.append(LayerError(item.weight.name, (difference / norm) ** 0.5 if norm else difference**0.5, bound))
    return _worst_first(errors)


def _square(values: torch.Tensor) -> float:
    return float(values.square().sum())


def _scale_rows(size: int, start: int, stop: int) -> tuple[int, int]:
    """Rows of the scales of rows [start, stop) of a weight; `size` is 0 for one scale per row."""
    return (start, stop) if size == 0 else (start // size, -(-stop // size))


def _worst_first(errors: Iterable[LayerError]) -> list[LayerError]:
    """Quantized layers by their error, after any tensor that should have been equal and is not."""
    return sorted(errors, key=lambda error: (error.good, -error.error))
