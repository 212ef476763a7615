"""`sparge_attn`, `spas_sage_attn2`: sparse 8-bit attention of SpargeAttn (arXiv 2502.18137), package `spas_sage_attn`.

The first lets the package choose the blocks of keys. For the second they are chosen here, as SLA does (arXiv
2509.24006): those whose mean key is closest to the mean query of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.attention.base import HALVES, Backend
from lightx2v.attention.hardware import nvidia
from lightx2v.attention.kernel import maskless
from lightx2v.attention.quantized import smooth
from lightx2v.platform import compute_capability, gpu_symbol
from lightx2v.vendor import Function

SPARGE_SHARE = 0.5
"""Share of the keys' blocks that is computed; what the package recommends."""
BLOCK_SHARE = 0.2
"""The same for `spas_sage_attn2`: LightX2V's default, for models that were trained to be sparse."""

TOP = Function(
    (gpu_symbol("spas_sage_attn:spas_sage2_attn_meansim_topk"),),
    ("q", "k", "v"),
    ("is_causal", "scale", "topk", "tensor_layout"),
)
MASKED = Function(
    (gpu_symbol("spas_sage_attn:block_sparse_sage2_attn"),), ("q", "k", "v"), ("mask_id", "scale", "tensor_layout")
)


@maskless("sparge_attn")
def sparge_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out: Tensor = TOP.find().value(q, k, v, is_causal=False, scale=scale, topk=SPARGE_SHARE, tensor_layout="NHD")
    return out


@maskless("spas_sage_attn2")
def spas_sage_attn2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    # Blocks of its kernels: 64 queries and 128 keys on Hopper, 128 and 64 elsewhere.
    sizes = (64, 128) if compute_capability(q.device) == (9, 0) else (128, 64)
    blocks = closest_blocks(q, k, BLOCK_SHARE, *sizes)
    out: Tensor = MASKED.find().value(q, k, v, mask_id=blocks.to(torch.int8), scale=scale, tensor_layout="NHD")
    return out


def closest_blocks(q: Tensor, k: Tensor, share: float, query_block: int, key_block: int) -> Tensor:
    """For each block of queries the `share` of the blocks of keys, at least one, whose means have the largest product.

    q [B, L, H, Dh] and k [B, S, H, Dh] give bool [B, H, ceil(L / query_block), ceil(S / key_block)].
    """
    scores = _means(q, query_block) @ _means(smooth(k), key_block).transpose(-1, -2)
    best = scores.topk(max(1, int(share * scores.shape[-1])), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def _means(x: Tensor, size: int) -> Tensor:
    """[B, L, H, Dh] to the means of blocks of tokens, [B, H, ceil(L / size), Dh] float32; the last may be partial."""
    tokens = x.shape[1]
    sums = F.pad(x.float(), (0, 0, 0, 0, 0, -tokens % size)).unflatten(1, (-1, size)).sum(2)
    counts = torch.full((sums.shape[1],), size, device=x.device)
    counts[-1] -= -tokens % size
    return (sums / counts[:, None, None]).transpose(1, 2)


_NEEDS = nvidia(((8, 0), (9, 0)), ((12, 0), (12, 1)))
SPARGE = Backend(
    sparge_attn, _NEEDS, TOP, dtypes=HALVES, head_dims=(64, 128), exact=False, self_only=True, min_tokens=128
)
BLOCKS = Backend(
    spas_sage_attn2, _NEEDS, MASKED, dtypes=HALVES, head_dims=(64, 128), exact=False, self_only=True, min_tokens=128
)
