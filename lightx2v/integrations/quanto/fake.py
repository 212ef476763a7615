"""Rounding to quantized values in floating point, through which gradients pass as if it were not there.

The straight-through estimator (Bengio et al., 2013, arXiv 1308.3432), as optimum-quanto trains with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightx2v.quant.numerics import FP8_MAX, INT8_MAX
from lightx2v.quant.quanto import round_weight
from lightx2v.quant.spec import QSpec

LEVELS = {"int8": float(INT8_MAX), "fp8": FP8_MAX}


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return rounded
    result: Tensor = _Straight.apply(value, rounded)
    return result


def fake_weight(weight: Tensor, spec: QSpec) -> Tensor:
    """A weight [N, ...] as it is once it is quantized, in its shape and dtype."""
    with torch.no_grad():
        rounded = round_weight(weight.flatten(1), spec).view_as(weight)
    return straight(weight, rounded)


def fake_activation(x: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """x of any shape as int8 or fp8 codes under one scale [] and back, in its dtype."""
    with torch.no_grad():
        scaled = x.float() / scale.float()
        if dtype == "int8":
            codes = scaled.round_().clamp_(-INT8_MAX - 1, INT8_MAX)
        else:
            codes = scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
        rounded = codes.mul_(scale.float()).to(x.dtype)
    return straight(x, rounded)
