"""Rounding to quantized values in floating point, through which gradients pass as if it were not there.

The straight-through estimator (Bengio et al., 2013, arXiv 1308.3432), as optimum-quanto trains with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightx2v.quant.numerics import FP8_MAX, INT8_MAX
from lightx2v.quant.quanto import Ranges, codes_in, round_weight
from lightx2v.quant.spec import QSpec

LEVELS = {"int8": float(INT8_MAX), "fp8": FP8_MAX}


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _InRanges(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, low: Tensor, rounded: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        by_group = grads[0].float().reshape(codes.shape)
        return grads[0], (by_group * codes).sum(dim=2), by_group.sum(dim=2), None, None


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return rounded
    result: Tensor = _Straight.apply(value, rounded)
    return result


def fake_weight(weight: Tensor, spec: QSpec, ranges: Ranges | None = None) -> Tensor:
    """A weight [N, ...] as it is once it is quantized, in its shape and dtype.

    Of `ranges` the gradients are exact, those of code * scale + low with the codes as they are.
    """
    with torch.no_grad():
        rounded = round_weight(weight.flatten(1), spec, ranges).view_as(weight)
    if ranges is None or not (torch.is_grad_enabled() and any(part.requires_grad for part in ranges)):
        return straight(weight, rounded)
    with torch.no_grad():
        codes = codes_in(weight.flatten(1), spec, ranges)
    values: Tensor = _InRanges.apply(weight, *ranges, rounded, codes)
    return values


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
