"""Linear layers that belong together: several projections of the same tokens, and the two of a feed-forward."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightx2v.elementwise import gelu_codes, gelu_tanh, has_gelu_codes
from lightx2v.mm.fused import FusedPart
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.lowrank import LowRankLinear, without_branch

CPU_ROWS = 1024
"""Rows that a feed-forward takes at a time on a CPU, so that its wide middle stays in the outer cache."""


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Each of `linears` of x [..., K].

    One product where `fuse_projections` has put their weights together; else one quantization of x where they agree on
    it; else one after the other.
    """
    first = linears[0]
    if isinstance(first, FusedPart) and all(isinstance(other, FusedPart) and other.of is first.of for other in linears):
        return first.of(x).split([linear.out_features for linear in linears], dim=-1)
    quantized = [layer for layer in map(without_branch, linears) if isinstance(layer, QuantLinear)]
    if len(quantized) == len(linears) > 1 and all(quantized[0].quantizes_as(other) for other in quantized[1:]):
        codes, able = quantized[0].quantize(x), cast(tuple[Any, ...], linears)
        return tuple(linear.multiply(codes, x) for linear in able)
    return tuple(linear(x) for linear in linears)


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """down(gelu(up(x))) with the tanh approximation, for x [B, L, K]."""
    step = x.shape[1]
    if x.device.type == "cpu" and not torch.is_grad_enabled() and _takes_rows(up) and _takes_rows(down):
        step = max(1, CPU_ROWS // x.shape[0])
    parts = [_both(part, up, down) for part in x.split(step, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _both(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """down(gelu(up(x))); GELU and the quantization behind it in one pass where there is a kernel for both."""
    kind = down.token_codes if isinstance(down, QuantLinear) and x.numel() else None
    if kind is None or not has_gelu_codes(x):
        return cast(Tensor, down(_up(x, up)))
    y = up(x)
    return cast(QuantLinear, down).multiply(gelu_codes(y.reshape(-1, y.shape[-1]), kind), y)


def _takes_rows(layer: nn.Module) -> bool:
    """Whether what it makes of a row does not depend on the others."""
    layer = without_branch(layer)
    return isinstance(layer, nn.Linear) or (isinstance(layer, QuantLinear) and layer.takes_rows)


def _up(x: Tensor, up: nn.Module) -> Tensor:
    return up(x, gelu=True) if isinstance(up, QuantLinear | LowRankLinear) else gelu_tanh(up(x))
