"""`flash_attn3`, `flash_attn3_fp8`: FlashAttention-3 (arXiv 2407.08608) for Hopper GPUs, `flash_attn_interface`."""

from __future__ import annotations

from torch import Tensor

from lightx2v.attention.base import HALVES, Backend
from lightx2v.attention.hardware import nvidia
from lightx2v.attention.kernel import maskless
from lightx2v.attention.quantized import heads_to_fp8, smooth
from lightx2v.vendor import Function

PLACE = ("flash_attn_interface:flash_attn_func",)
FUNCTION = Function(PLACE, ("q", "k", "v"), ("softmax_scale", "causal"))
FUNCTION_FP8 = Function(PLACE, ("q", "k", "v"), ("softmax_scale", "causal", "q_descale", "k_descale", "v_descale"))
HOPPER = nvidia(((9, 0), (9, 0)))


def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The attention alone: some releases also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


@maskless("flash_attn3")
def flash_attn3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return output(FUNCTION.find().value(q, k, v, softmax_scale=scale, causal=False))


@maskless("flash_attn3_fp8")
def flash_attn3_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Q, K and V in e4m3 with one scale [B, H] for each head; the result is bfloat16 and made q's dtype.

    The mean of K over its tokens is taken away first, which the softmax does not see and FP8 gains most from: by
    itself the package does not do so.
    """
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = map(heads_to_fp8, (q, smooth(k), v))
    scales = {"q_descale": q_scale, "k_descale": k_scale, "v_descale": v_scale}
    return output(FUNCTION_FP8.find().value(q8, k8, v8, softmax_scale=scale, causal=False, **scales)).to(q.dtype)


BACKEND = Backend(flash_attn3, HOPPER, FUNCTION, dtypes=HALVES, head_dims=range(8, 257, 8))
FP8 = Backend(flash_attn3_fp8, HOPPER, FUNCTION_FP8, dtypes=HALVES, head_dims=range(16, 257, 16), exact=False)
