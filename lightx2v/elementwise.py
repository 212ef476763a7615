"""What a transformer block computes between its products: one pass each, where the device has a kernel for it.

Shapes: B batch, L tokens, D width, H heads of width Dh. Norms, rotations and the residual stream are float32 whatever
goes in; only results are rounded. On CPUs the compiled kernels of `lightx2v.native` do it; everywhere else, and
wherever gradients are wanted, these definitions in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Rope = tuple[Tensor, Tensor]
"""Cosines and sines [L, 1, Dh/2] of the rotary embedding, float32."""


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm over D of x [B, L, D], times `weight` and plus `bias` [D], as `dtype`."""
    if weight is not None and bias is not None and _native(x, dtype, weight, bias) and x.dtype == torch.float32:
        from lightx2v.native import ops

        return ops.layer_norm(x, weight.float(), bias.float(), eps, dtype)
    weight, bias = (p if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm over D of float32 x [B, L, D], times 1 + `scale` plus `shift`, float32 [B or 1, 1, D], as `dtype`."""
    if _native(x, dtype, shift, scale):
        from lightx2v.native import ops

        return ops.layer_norm(x, 1 + scale, shift, eps, dtype)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale).to(dtype)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, heads: int, rope: Rope | None) -> Tensor:
    """RMS norm of x [B, L, D] with `weight`, then the rotary embedding of each head: [B, L, H, Dh].

    A weight [D] is for a norm over D, one of [Dh] for a norm of each head. Without a weight there is no norm, without
    `rope` no rotation. The result has the dtype of x.
    """
    weight = None if weight is None else weight.float()
    if _native(x, x.dtype, weight):
        from lightx2v.native import ops

        cosines, sines = (None, None) if rope is None else (table.flatten(1) for table in rope)
        return ops.rms_rope(x, weight, cosines, sines, heads, eps).unflatten(2, (heads, -1))
    y = x.float()
    if weight is not None:
        y = F.rms_norm(y.unflatten(-1, (-1, weight.shape[0])), weight.shape, weight, eps).flatten(-2)
    y = y.unflatten(-1, (heads, -1))
    return (y if rope is None else rotate(y, rope)).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of x [B, L, H, Dh], whose neighbouring components make the rotation planes."""
    cosines, sines = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), dim=-1).flatten(-2)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """The residual stream: float32 x [B, L, D] plus y times `gate`, float32 [B or 1, 1, D], where there is one."""
    if _native(x, y.dtype, y, gate):
        from lightx2v.native import ops

        return ops.add_gated(x, y, gate)
    return x + y if gate is None else x + y * gate


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation (Hendrycks & Gimpel 2016)."""
    if _native(x, x.dtype):
        from lightx2v.native import ops

        return ops.gelu_tanh(x)
    return F.gelu(x, approximate="tanh")


def _native(x: Tensor, result: torch.dtype, *others: Tensor | None) -> bool:
    """Whether the compiled kernels can do it: on a CPU, in their dtypes, where no gradient is asked for."""
    if x.device.type != "cpu":
        return False
    from lightx2v.native.build import kernels
    from lightx2v.native.ops import DTYPES

    if kernels().library is None or x.dtype not in DTYPES or result not in DTYPES:
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))
