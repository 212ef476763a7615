"""Linear layers that belong together: several projections of the same tokens, and the two of a feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightx2v.deferred import Normed, Tokens
from lightx2v.elementwise import gelu_codes, gelu_tanh, has_gelu_codes, joined_gelu_codes, makes_codes
from lightx2v.mm.fused import FusedPart
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.lowrank import LowRankLinear, without_branch

CPU_ROWS = 1024
"""Rows that a feed-forward takes at a time on a CPU, so that its wide middle stays in the outer cache."""


def project(x: Tokens, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Each of `linears` of x [..., K].

    One product where `fuse_projections` has put their weights together; else one quantization of x where they agree on
    it; else one after the other. A norm that is not computed yet becomes codes where all of them multiply codes that
    its pass can make, and a tensor for all others.
    """
    first = linears[0]
    if isinstance(first, FusedPart) and all(isinstance(other, FusedPart) and other.of is first.of for other in linears):
        return _products(x, [first.of])[0].split([linear.out_features for linear in linears], dim=-1)
    return _products(x, linears)


def _products(x: Tokens, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    able = cast(Sequence[Any], layers)
    quantized = [layer for layer in map(without_branch, layers) if isinstance(layer, QuantLinear)]
    agree = len(quantized) == len(layers) and all(quantized[0].quantizes_as(other) for other in quantized[1:])
    if isinstance(x, Normed):
        # A branch reads the norm itself, as low ranks around a product do.
        branched = any(layer is not plain for layer, plain in zip(layers, quantized, strict=False))
        form = quantized[0].token_codes if agree and not branched else None
        if form is not None and makes_codes(x.device, form.kind) and all(layer.token_codes for layer in quantized):
            codes = x.codes(*form)
            return tuple(layer.multiply(codes, x) for layer in able)
        x = x.tensor()
    if agree and len(layers) > 1:
        codes = quantized[0].quantize(x)
        return tuple(layer.multiply(codes, x) for layer in able)
    return tuple(layer(x) for layer in able)


def feed_forward(x: Tokens, up: nn.Module, down: nn.Module) -> Tensor:
    """down(gelu(up(x))) with the tanh approximation, for x [B, L, K]."""
    if isinstance(x, Normed):
        return _both(x, up, down)
    step = x.shape[1]
    if x.device.type == "cpu" and not torch.is_grad_enabled() and _takes_rows(up) and _takes_rows(down):
        step = max(1, CPU_ROWS // x.shape[0])
    parts = [_both(part, up, down) for part in x.split(step, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def project_joined(x: Tensor, y: Tensor, linear: nn.Module) -> Tensor:
    """`linear` of x [B, L, K'] and the GELU (tanh) of y [B, L, K] side by side."""
    form = linear.token_codes if isinstance(linear, QuantLinear) and x.numel() else None
    if form is None or not (has_gelu_codes(y) and makes_codes(y.device, form.kind)):
        return cast(Tensor, linear(torch.cat([x, gelu_tanh(y)], dim=-1)))
    codes = joined_gelu_codes(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), *form)
    return cast(QuantLinear, linear).multiply(codes, x)


def _both(x: Tokens, up: nn.Module, down: nn.Module) -> Tensor:
    """down(gelu(up(x))); GELU and the quantization behind it in one pass where there is a kernel for both."""
    form = down.token_codes if isinstance(down, QuantLinear) and x.shape.numel() else None
    if form is None or not ((isinstance(x, Normed) or has_gelu_codes(x)) and makes_codes(x.device, form.kind)):
        return cast(Tensor, down(_up(x, up)))
    (y,) = project(x, up)
    return cast(QuantLinear, down).multiply(gelu_codes(y.reshape(-1, y.shape[-1]), *form), y)


def _takes_rows(layer: nn.Module) -> bool:
    """Whether what it makes of a row does not depend on the others."""
    layer = without_branch(layer)
    return isinstance(layer, nn.Linear) or (isinstance(layer, QuantLinear) and layer.takes_rows)


def _up(x: Tokens, up: nn.Module) -> Tensor:
    if isinstance(x, Tensor) and isinstance(up, QuantLinear | LowRankLinear):
        return cast(Tensor, up(x, gelu=True))
    return gelu_tanh(project(x, up)[0])
