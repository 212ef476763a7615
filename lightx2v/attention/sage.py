"""`sage_attn2`, `sage_attn2_k_int8_v_fp8` (arXiv 2411.10958, 2505.21136) and `sage_attn3` (arXiv 2505.11594).

SageAttention2: Q and K in int8 with K's mean taken away, P and V in fp8 (float16 on Ampere). SageAttention3: FP4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.attention.base import HALVES, Backend
from lightx2v.attention.hardware import nvidia
from lightx2v.attention.kernel import maskless
from lightx2v.platform import compute_capability, gpu_symbol
from lightx2v.vendor import Function

_KEYWORDS = ("tensor_layout", "is_causal", "sm_scale")
_FP8 = gpu_symbol("sageattention:sageattn_qk_int8_pv_fp8")
AUTO = Function(("sageattention:sageattn",), ("q", "k", "v"), _KEYWORDS)
ADA = Function((_FP8,), ("q", "k", "v"), (*_KEYWORDS, "qk_quant_gran", "pv_accum_dtype", "smooth_k"))
HOPPER = Function((f"{_FP8}_sm90",), ADA.positional, ADA.keywords)
FP4 = Function(("sageattn3:sageattn3_blackwell",), ("q", "k", "v"), ("is_causal",))
BLACKWELL = ((12, 0), (12, 1))


@maskless("sage_attn2")
def sage_attn2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The kernel that the package chooses for the GPU."""
    out: Tensor = AUTO.find().value(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale)
    return out


@maskless("sage_attn2_k_int8_v_fp8")
def sage_attn2_fp8(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Int8 Q K^T and fp8 P V with sums in float32, whatever the package would choose."""
    capability = compute_capability(q.device)
    # The kernels of consumer Blackwell have no scales per thread.
    granularity = "per_warp" if capability is not None and capability >= BLACKWELL[0] else "per_thread"
    out: Tensor = (HOPPER if capability == (9, 0) else ADA).find().value(
        q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale,
        qk_quant_gran=granularity, pv_accum_dtype="fp32+fp32", smooth_k=True,
    )  # fmt: skip
    return out


@maskless("sage_attn3")
def sage_attn3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """It takes no scale but Dh**-0.5, so q carries the rest, and it writes into the keys it is given."""
    factor = scale * q.shape[-1] ** 0.5
    q = q if abs(factor - 1) < 1e-6 else q * factor
    keys = k.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    out: Tensor = FP4.find().value(q.transpose(1, 2), keys, v.transpose(1, 2), is_causal=False)
    return out.transpose(1, 2)


_EXACT_SPANS = [((8, 0), (8, 0)), ((8, 6), (8, 6)), ((8, 9), (9, 0)), BLACKWELL]
SAGE2 = Backend(sage_attn2, nvidia(*_EXACT_SPANS), AUTO, (2, 0), dtypes=HALVES, head_dims=range(1, 129), exact=False)
SAGE2_FP8 = Backend(
    sage_attn2_fp8,
    nvidia(((8, 9), (9, 0)), BLACKWELL),
    ADA,
    (2, 0),
    dtypes=HALVES,
    head_dims=range(1, 129),
    exact=False,
)
SAGE3 = Backend(sage_attn3, nvidia(BLACKWELL), FP4, dtypes=HALVES, head_dims=(64, 128), exact=False)
