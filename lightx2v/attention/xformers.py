"""`xformers`: the memory-efficient attention of xFormers, which takes the kernel it finds best."""

from __future__ import annotations

from torch import Tensor

from lightx2v.attention.base import Backend
from lightx2v.attention.hardware import NEWEST, nvidia
from lightx2v.attention.kernel import maskless
from lightx2v.vendor import Function

FUNCTION = Function(
    ("xformers.ops:memory_efficient_attention",), ("query", "key", "value"), ("attn_bias", "p", "scale")
)


@maskless("xformers")
def xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out: Tensor = FUNCTION.find().value(q, k, v, attn_bias=None, p=0.0, scale=scale)
    return out


BACKEND = Backend(xformers, nvidia(((8, 0), NEWEST), amd=True), FUNCTION, head_dims=range(8, 257, 8))
