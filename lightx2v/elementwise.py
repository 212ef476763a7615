"""What a transformer block computes between its products: one pass each, where the device has a kernel for it.

Shapes: B batch, L tokens, D width, H heads of width Dh. Norms, rotations and the residual stream are float32 whatever
goes in; only results are rounded. On CPUs the compiled kernels of `lightx2v.native` do it, on NVIDIA GPUs
those of `lightx2v.kernels` once they have proved themselves there; everywhere else, under torch.compile on a GPU, and
wherever gradients are wanted, these definitions in torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.kernels.trial import usable
from lightx2v.platform import compute_capability
from lightx2v.quant.numerics import Quantized

_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
Rope = tuple[Tensor, Tensor]
"""Cosines and sines [L, 1, Dh/2] of the rotary embedding, float32."""


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm over D of x [B, L, D], times `weight` and plus `bias` [D], as `dtype`."""
    if weight is not None and bias is not None and x.dtype == torch.float32:
        kernels = kernels_for(x, dtype, weight, bias)
        if kernels is not None:
            made: Tensor = kernels.layer_norm(x, weight.float(), bias.float(), eps, dtype)
            return made
    weight, bias = (p if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm over D of float32 x [B, L, D], times 1 + `scale` plus `shift`, float32 [B or 1, 1, D], as `dtype`."""
    kernels = kernels_for(x, dtype, shift, scale)
    if kernels is not None:
        made: Tensor = kernels.layer_norm(x, 1 + scale, shift, eps, dtype)
        return made
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale).to(dtype)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, heads: int, rope: Rope | None) -> Tensor:
    """RMS norm of x [B, L, D] with `weight`, then the rotary embedding of each head: [B, L, H, Dh].

    A weight [D] is for a norm over D, one of [Dh] for a norm of each head. Without a weight there is no norm, without
    `rope` no rotation. The result has the dtype of x.
    """
    weight = None if weight is None else weight.float()
    kernels = kernels_for(x, x.dtype, weight)
    if kernels is not None:
        cosines, sines = (None, None) if rope is None else (table.flatten(1) for table in rope)
        made: Tensor = kernels.rms_rope(x, weight, cosines, sines, heads, eps).unflatten(2, (heads, -1))
        return made
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
    kernels = kernels_for(x, y.dtype, y, gate)
    if kernels is not None:
        made: Tensor = kernels.add_gated(x, y, gate)
        return made
    return x + y if gate is None else x + y * gate


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation (Hendrycks & Gimpel 2016)."""
    kernels = kernels_for(x, x.dtype)
    if kernels is not None:
        made: Tensor = kernels.gelu_tanh(x)
        return made
    return F.gelu(x, approximate="tanh")


def has_gelu_codes(x: Tensor) -> bool:
    """Whether `gelu_codes` can be called for tensors like x."""
    return hasattr(kernels_for(x, x.dtype), "gelu_codes")


@lru_cache(maxsize=32)
def makes_codes(device: torch.device, kind: str) -> bool:
    """Whether kernels on `device` can round to codes of `kind`: Triton has e4m3 from compute capability 8.9 on."""
    capability = compute_capability(device)
    return kind != "fp8" or capability is None or capability >= (8, 9)


def gelu_codes(x: Tensor, kind: str, multiplier: Tensor | None) -> Quantized:
    """The GELU of x [M, K], rounded to its dtype, as codes of `kind` with a scale per row, in one pass.

    `kind` is "int8" or "fp8"; rounding is quant.numerics.NATIVE. A float32 `multiplier` [K] comes between the two, with
    a rounding of its own. For devices with `has_gelu_codes`.
    """
    return Quantized(*kernels_for(x, x.dtype).gelu_codes(x, multiplier, kind))


def joined_gelu_codes(x: Tensor, y: Tensor, kind: str, multiplier: Tensor | None) -> Quantized:
    """The same of x [M, K'] and the GELU of y [M, K] side by side: codes [M, K' + K]."""
    return Quantized(*kernels_for(y, y.dtype).joined_gelu_codes(x, y, multiplier, kind))


def kernels_for(x: Tensor, result: torch.dtype, *others: Tensor | None) -> Any:
    """Kernels, `native.ops` or `kernels.ops`, that can take x and the others to a result of that dtype.

    None where there are none, or a gradient is asked for.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return None
    if x.device.type == "cpu":
        from lightx2v.native import ops as compiled
        from lightx2v.native.build import kernels

        able = kernels().library is not None and x.dtype in compiled.DTYPES and result in compiled.DTYPES
        return compiled if able else None
    # torch.compile makes such kernels itself, of more steps at a time.
    if torch.compiler.is_compiling() or not {x.dtype, result} <= _FLOATS or not usable(x.device):
        return None
    from lightx2v.kernels import ops

    return ops
