"""`flash_attn2`: FlashAttention-2 (arXiv 2307.08691), package `flash-attn`."""

from __future__ import annotations

from torch import Tensor

from lightx2v.attention.base import HALVES, Backend
from lightx2v.attention.hardware import NEWEST, nvidia
from lightx2v.attention.kernel import maskless
from lightx2v.vendor import Function

FUNCTION = Function(("flash_attn:flash_attn_func",), ("q", "k", "v"), ("softmax_scale", "causal"))
HEAD_DIMS = range(8, 257, 8)


@maskless("flash_attn2")
def flash_attn2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out: Tensor = FUNCTION.find().value(q, k, v, softmax_scale=scale, causal=False)
    return out


BACKEND = Backend(flash_attn2, nvidia(((8, 0), NEWEST), amd=True), FUNCTION, (2, 0), dtypes=HALVES, head_dims=HEAD_DIMS)
