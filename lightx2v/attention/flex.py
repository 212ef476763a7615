"""`flex`: torch's FlexAttention, which torch.compile writes a kernel for; and attention of whole blocks by it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightx2v.attention.base import Backend
from lightx2v.attention.kernel import maskless
from lightx2v.platform import compiler_for


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, block_mask: Any = None) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh]; compiles for each new shape, in seconds."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out: Tensor = _compiled()(q, k, v, scale=scale, block_mask=block_mask)
    return out.transpose(1, 2)


def block_mask(blocks: Tensor, queries: int, keys: int, size: int) -> Any:
    """FlexAttention's mask from `blocks` [ceil(queries / size), ceil(keys / size)], True where a block is computed."""
    from torch.nn.attention.flex_attention import BlockMask

    def looks(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks[query // size, key // size]

    counts = blocks.sum(-1, dtype=torch.int32)[None, None]
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None, None]
    none = torch.zeros_like(counts), torch.zeros_like(order)  # no block is computed in part
    return BlockMask.from_kv_blocks(*none, counts, order, BLOCK_SIZE=size, mask_mod=looks, seq_lengths=(queries, keys))


@maskless("flex")
def flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return flex_attention(q, k, v, scale)


BACKEND = Backend(flex, missing=compiler_for)
