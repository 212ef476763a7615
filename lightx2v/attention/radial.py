"""`radial_attn`: Radial Attention (arXiv 2506.19852), a fixed pattern of blocks of tokens, run by FlexAttention.

How far a token sees within another frame halves with every doubling of the distance between the frames; where less than
a block would be left, only some of the frames are seen. The first frame is seen by all. The pattern of blocks is that
of the authors' code for Wan, with the width that it uses for Wan2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightx2v.attention.base import AttentionFn, Backend, Grid
from lightx2v.attention.flex import block_mask, flex_attention
from lightx2v.attention.kernel import as_operator
from lightx2v.errors import LightX2VError
from lightx2v.platform import compiler_for

BLOCK = 128
DECAY = 0.2
"""Width of the window over the token count of a frame at distance 1."""


def radial_blocks(grid: Grid, tokens: int, block: int = BLOCK, decay: float = DECAY) -> Tensor:
    """Which blocks of keys each block of queries sees: bool [ceil(tokens / block)] * 2, on the CPU.

    `tokens` are those of the grid, frame after frame, and maybe others after them, which see and are seen by all.
    """
    frames, size = grid[0], grid[1] * grid[2]
    count = -(-tokens // block)
    blocks = torch.zeros(count, count, dtype=torch.bool)
    blocks[frames * size // block :] = True
    blocks[:, frames * size // block :] = True
    starts = [frame * size for frame in range(frames)]
    for i, row in enumerate(starts):
        for j, column in enumerate(starts):
            width = _window(abs(i - j), size, block, decay) if j else size
            if width is not None:
                _mark(blocks, row, column, size, width, block)
    return blocks


def _window(distance: int, size: int, block: int, decay: float) -> float | None:
    """How many tokens to either side one sees in a frame at this distance; None where the frame is left out."""
    if distance <= 1:
        return size
    length = 2.0 ** (size.bit_length() - distance.bit_length())
    if length < block and distance % int(block / length):
        return None
    return max(length * decay, block)


def _mark(blocks: Tensor, row: int, column: int, size: int, width: float, block: int) -> None:
    """Add the blocks of one pair of frames, from tokens `row` and `column` on: those that are seen for the most part.

    A column of a block counts when more than a third of the block's rows see it, and a block when more than 0.6 of its
    columns that any row sees count.
    """
    rows = torch.arange(row // block, -(-(row + size) // block))
    first = (rows * block - row).clamp(min=0)[:, None]
    last = ((rows + 1) * block - row).clamp(max=size)[:, None] - 1
    columns = torch.arange(size)
    reach = int(width)
    seen = (torch.minimum(last, columns + reach) - torch.maximum(first, columns - reach) + 1).clamp(min=0)
    place = (column + columns) // block
    shape = (len(rows), blocks.shape[1])
    high = torch.zeros(shape).index_add_(1, place, (seen * 3 > block).float())
    some = torch.zeros(shape).index_add_(1, place, (seen > 0).float())
    blocks[rows] |= high > 0.6 * some


@lru_cache(maxsize=8)
def _block_mask(grid: Grid, tokens: int, device: torch.device) -> Any:
    return block_mask(radial_blocks(grid, tokens).to(device), tokens, tokens, BLOCK)


def _radial(q: Tensor, k: Tensor, v: Tensor, scale: float, grid: list[int]) -> Tensor:
    frames, height, width = grid
    return flex_attention(q, k, v, scale, _block_mask((frames, height, width), q.shape[1], q.device))


_run: Callable[..., Tensor] = as_operator("radial_attn", _radial)


@lru_cache(maxsize=8)
def for_grid(grid: Grid) -> AttentionFn:
    """Radial attention of the tokens of a video of this grid, and of text after them."""

    def radial_attn(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        if mask is not None or q.shape[1] != k.shape[1] or q.shape[1] < math.prod(grid):
            raise LightX2VError(
                "radial_attn",
                f"{q.shape[1]} tokens that look at {k.shape[1]}{' with a mask' if mask is not None else ''}",
                allowed=f"at least {math.prod(grid)} tokens, {' x '.join(map(str, grid))}, that look at each other",
            )
        return _run(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, list(grid))

    return radial_attn


def no_grid(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    raise LightX2VError("radial_attn", "the size of the video is not known where it was called")


BACKEND = Backend(no_grid, missing=compiler_for, exact=False, self_only=True, for_grid=for_grid)
