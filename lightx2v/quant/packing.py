"""Codes of less than a byte in bytes, and the orders in which GPUs want them.

M, N rows; K columns. All of it moves bits only, and is exactly reversible.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 128, 4


def pack4(codes: Tensor) -> Tensor:
    """uint8 codes below 16 [N, K] -> uint8 [N, K/2], the first of two in the low half. K is even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def swap_halves(packed: Tensor) -> Tensor:
    """Bytes with the two codes of each exchanged, as ComfyUI packs them."""
    return (packed << 4) | (packed >> 4)


def swapped_sign(codes: Tensor) -> Tensor:
    """uint8 codes + 128 as the int8 codes."""
    return (codes ^ 128).view(torch.int8)


def pack6(codes: Tensor) -> Tensor:
    """uint8 codes below 64 [N, K] -> uint8 [N, 3K/4]: four codes, lowest bits first, in three bytes. K is 4n."""
    a, b, c, d = codes.unflatten(1, (-1, 4)).unbind(2)
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), dim=2).flatten(1)


def pairs6(packed: Tensor) -> Tensor:
    """uint8 [N, 3K/4] -> int64 [N, K/2], each of two codes, the first in the low six bits."""
    x, y, z = packed.long().unflatten(1, (-1, 3)).unbind(2)
    return torch.stack((x | ((y & 15) << 8), (y >> 4) | (z << 4)), dim=2).flatten(1)


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of `swizzle` of [rows, columns]: filled up to whole tiles of 128 x 4."""
    return rows + -rows % TILE_ROWS, columns + -columns % TILE_COLUMNS


def swizzle(scale: Tensor) -> Tensor:
    """One-byte scales [N, G] in the order of block-scaled tensor cores, zero-filled to `swizzled_shape`.

    Row 32i + j and column c of a 128 x 4 tile lie at byte 16j + 4i + c of its 512, and the tiles of a band of 128 rows
    one after the other (cuBLAS' documentation, "1D block scaling factors layout").
    """
    rows, columns = swizzled_shape(*scale.shape)
    whole = F.pad(scale.view(torch.uint8), (0, columns - scale.shape[1], 0, rows - scale.shape[0]))
    tiles = whole.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns).view(scale.dtype)


def unswizzle(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The [rows, columns] scales of which `swizzle` made `scale`."""
    whole_rows, whole_columns = swizzled_shape(rows, columns)
    tiles = scale.contiguous().view(torch.uint8).view(whole_rows // 128, whole_columns // 4, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(whole_rows, whole_columns)
    return plain[:rows, :columns].contiguous().view(scale.dtype)


@lru_cache(maxsize=1)
def _marlin_order() -> tuple[Tensor, Tensor]:
    """Where Marlin puts the 1024 codes of four 16 x 16 tiles, and the scales of 64 channels.

    The codes of a tile go to the 32 lanes of a warp as the tensor cores' m16n8k16 fragments want them
    (https://github.com/IST-DASLab/marlin).
    """
    order = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        fragment = [16 * (row + r) + column + 8 * half for half in (0, 1) for r in (0, 1, 8, 9)]
        for tile in range(4):
            order += [256 * tile + fragment[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return torch.tensor(order), torch.arange(64).view(8, 8).t().reshape(-1)


def unpack_marlin(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [K/16, 2N] and scales [K/128, N] in Marlin's order -> uint8 codes [N, K] and scales [N, K/128]."""
    order, scale_order = (index.to(packed.device) for index in _marlin_order())
    k, n = 16 * packed.shape[0], packed.shape[1] // 2
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    mixed = ((packed.unsqueeze(2) >> shifts) & 15).to(torch.uint8).view(-1, 1024)
    tiles = torch.empty_like(mixed)
    tiles[:, order] = mixed
    codes = tiles.view(k // 16, n // 16, 16, 16).permute(1, 3, 0, 2).reshape(n, k)
    plain = torch.empty_like(scale).view(-1, 64)
    plain[:, scale_order] = scale.reshape(-1, 64)
    return codes, plain.view(scale.shape).t().contiguous()
