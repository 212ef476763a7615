"""`flash_attn4`: FlashAttention-4, written in CuTe DSL for Hopper and Blackwell GPUs, package `flash-attn-4`."""

from __future__ import annotations

from torch import Tensor

from lightx2v.attention.base import HALVES, Backend
from lightx2v.attention.flash3 import output
from lightx2v.attention.hardware import NEWEST, nvidia
from lightx2v.attention.kernel import maskless
from lightx2v.vendor import Function

FUNCTION = Function(("flash_attn.cute:flash_attn_func",), ("q", "k", "v"), ("softmax_scale", "causal"))
HOPPER_UP = nvidia(((9, 0), NEWEST))
#: Blackwell's kernels end at 128, but for widths that no diffusion transformer has.
HEAD_DIMS = range(8, 129, 8)


@maskless("flash_attn4")
def flash_attn4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return output(FUNCTION.find().value(q, k, v, softmax_scale=scale, causal=False))


BACKEND = Backend(flash_attn4, HOPPER_UP, FUNCTION, dtypes=HALVES, head_dims=HEAD_DIMS)
