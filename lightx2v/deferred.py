"""The residual stream, its norms, and queries and keys inside a block, computed when they are read.

A branch begins with a norm of the stream and ends with an addition to it. In which form the norm is wanted is known
where it is read: a product of 8-bit codes takes codes, every other layer a tensor. So sums and norms wait for their
reader, and one pass adds, norms and quantizes; and so do the norm and rotation in front of an attention. Where the
device has no kernel that does, and under torch.compile, which makes such kernels itself, the functions here give
tensors at once.

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightx2v import elementwise
from lightx2v.elementwise import Rope
from lightx2v.quant.numerics import Quantized


class Sum:
    """Float32 x [B, L, D] plus y times `gate`, made once by its first reader, which may do more in the same pass."""

    def __init__(self, x: Tensor, y: Tensor, gate: Tensor | None) -> None:
        self.made: Tensor | None = None
        self.x, self.y, self.gate = x, y, gate

    def tensor(self) -> Tensor:
        """The sum."""
        return self.keep(elementwise.add_gated(self.x, self.y, self.gate)) if self.made is None else self.made

    def keep(self, made: Tensor) -> Tensor:
        """Take the sum from who has made it."""
        self.made = self.x = self.y = made  # and let go of what it was made of
        return made


class Normed:
    """Layer norm of x [B, L, D] times `factor` plus `offset`, float32 [D] or [B or 1, 1, D], to be read once."""

    def __init__(
        self, x: Tensor | Sum, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype, kernels: Any
    ) -> None:
        self.x, self.tables, self.dtype, self.kernels = x, (factor, offset), dtype, kernels
        self.eps = eps
        self.shape, self.device = _like(x).shape, _like(x).device

    def tensor(self) -> Tensor:
        """The norm, rounded to `dtype`."""
        x = self.x
        if isinstance(x, Sum) and x.made is None:
            total, made = self.kernels.sum_norm(x.x, x.y, x.gate, *self.tables, self.eps, self.dtype)
            x.keep(total)
        else:
            made = self.kernels.layer_norm(tensor_of(x), *self.tables, self.eps, self.dtype)
        result: Tensor = made
        return result

    def codes(self, kind: str, multiplier: Tensor | None) -> Quantized:
        """The codes [B * L, D] of that, "int8" or "fp8" with a scale per row, after a `multiplier` [D] of float32."""
        x, form = self.x, (multiplier, self.eps, self.dtype, kind)
        if isinstance(x, Sum) and x.made is None:
            total, *made = self.kernels.sum_norm_codes(x.x, x.y, x.gate, *self.tables, *form)
            x.keep(total)
        else:
            made = self.kernels.layer_norm_codes(tensor_of(x), *self.tables, *form)
        return Quantized(*made)


class Turned:
    """Queries or keys: x [B, L, D] normed by `weight`, [D] or [Dh], and rotated by `rope`; [B, L, H, Dh] in its dtype.

    An attention of 8-bit codes takes them in the pass that makes its codes.
    """

    def __init__(self, x: Tensor, weight: Tensor | None, eps: float, heads: int, rope: Rope | None) -> None:
        self.x, self.weight, self.eps, self.heads, self.rope = x, weight, eps, heads, rope

    def tensor(self) -> Tensor:
        """The queries or keys."""
        return elementwise.norm_rope(self.x, self.weight, self.eps, self.heads, self.rope)


Residual = Tensor | Sum
Tokens = Tensor | Normed
Heads = Tensor | Turned


def tensor_of(x: Tensor | Sum | Normed | Turned) -> Tensor:
    """x as a tensor."""
    return x if isinstance(x, Tensor) else x.tensor()


def add_gated(x: Residual, y: Tensor, gate: Tensor | None = None) -> Residual:
    """The residual stream: float32 x [B, L, D] plus y times `gate`, float32 [B or 1, 1, D], where there is one."""
    x = tensor_of(x)
    if _kernels(x, y.dtype, y, gate) is not None:
        return Sum(x, y, gate)
    return elementwise.add_gated(x, y, gate)


def layer_norm(x: Residual, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tokens:
    """Layer norm over D of x [B, L, D], times `weight` and plus `bias` [D], as `dtype`."""
    kernels = _kernels(_like(x), dtype, weight, bias)
    if kernels is not None:
        return Normed(x, weight.float(), bias.float(), eps, dtype, kernels)
    return elementwise.layer_norm(tensor_of(x), weight, bias, eps, dtype)


def modulated_norm(x: Residual, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tokens:
    """Layer norm over D of x [B, L, D], times 1 + `scale` plus `shift`, float32 [B or 1, 1, D], as `dtype`."""
    kernels = _kernels(_like(x), dtype, shift, scale)
    if kernels is not None:
        return Normed(x, 1 + scale, shift, eps, dtype, kernels)
    return elementwise.modulated_norm(tensor_of(x), shift, scale, eps, dtype)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, heads: int, rope: Rope | None) -> Heads:
    """As `elementwise.norm_rope`: RMS norm of x [B, L, D], then the rotary embedding of each head."""
    weight = None if weight is None else weight.float()
    if hasattr(elementwise.kernels_for(x, x.dtype, weight), "attention_turned"):
        return Turned(x, weight, eps, heads, rope)
    return elementwise.norm_rope(x, weight, eps, heads, rope)


def _like(x: Residual) -> Tensor:
    return x.x if isinstance(x, Sum) else x


def _kernels(x: Tensor, result: torch.dtype, *others: Tensor | None) -> Any:
    """Kernels that add, norm and quantize in one pass; None where there are none."""
    kernels = elementwise.kernels_for(x, result, *others)
    return kernels if x.dtype == torch.float32 and hasattr(kernels, "sum_norm_codes") else None
