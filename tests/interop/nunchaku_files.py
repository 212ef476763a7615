"""Layers as nunchaku stores them, packed here one number after the other.

The address of each number is that of the lane of a warp, and of its register, which holds it in the products of
m16n8k64 (codes) and m16n8k16 (low rank), as the PTX manual's figures of fragments have them; the order of scales is the
table of lanes in deepcompressor's `pack_scale` and `pack_micro_scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_CODES = torch.cat((E2M1, -E2M1)).double()


def packed_codes(codes: Tensor) -> Tensor:
    """Codes [N, K] of four bits, from 0 to 15 -> int8 [N, K / 2]."""
    (n, k), values = codes.shape, codes.tolist()
    data = bytearray(n * k // 2)
    for row in range(n):
        for column in range(k):
            tile = (row // 128) * (k // 64) + column // 64
            lane = 4 * (row % 8) + column % 32 // 8
            register = 2 * (row % 16 // 8) + column % 64 // 32
            word = ((tile * 8 + row % 128 // 16) * 32 + lane) * 4 + register
            data[4 * word + column % 8 // 2] |= values[row][column] << 4 * (column % 2)
    return torch.frombuffer(data, dtype=torch.int8).view(n, k // 2)


def packed_scales(scales: Tensor) -> Tensor:
    """[N, G] -> [G, N]: lane i holds rows 16 (i / 4) + 2 (i % 4) + 0, 1, 8 and 9 of 128."""
    n, groups = scales.shape
    rows = [16 * (lane // 4) + 2 * (lane % 4) + r for lane in range(32) for r in (0, 1, 8, 9)]
    tiles = [scales[128 * tile : 128 * tile + 128, group][rows] for tile in range(n // 128) for group in range(groups)]
    return torch.cat(tiles).view(groups, n)


def packed_vector(vector: Tensor) -> Tensor:
    return packed_scales(vector.view(-1, 1)).view(-1)


def packed_micro_scales(scales: Tensor) -> Tensor:
    """e4m3 [N, G] -> [G, N]: lane i holds rows 8 (i % 4) + i / 4 + 0, 32, 64 and 96 of 128, four groups of each."""
    n, groups = scales.shape
    stored = scales.view(torch.uint8)
    rows = [8 * (lane % 4) + lane // 4 + r for lane in range(32) for r in (0, 32, 64, 96)]
    tiles = [
        stored[128 * tile : 128 * tile + 128, four : four + 4][rows].reshape(-1)
        for tile in range(n // 128)
        for four in range(0, groups, 4)
    ]
    return torch.cat(tiles).view(groups, n).view(torch.float8_e4m3fn)


def packed_lowrank(matrix: Tensor, down: bool) -> Tensor:
    """down [R, K] -> [K, R], up [N, R] -> [N, R]: tiles of 16 x 16, those of the same K, or N, one after the other."""
    rows, columns = matrix.shape
    ranks, size = (rows, columns) if down else (columns, rows)
    flat = torch.empty(rows * columns, dtype=matrix.dtype)
    for row in range(rows):
        for column in range(columns):
            i, j = row // 16, column // 16
            tile = j * (ranks // 16) + i if down else i * (ranks // 16) + j
            lane = 4 * (row % 8) + column % 8 // 2
            register = 2 * (row % 16 // 8) + column % 16 // 8
            flat[256 * tile + 8 * lane + 2 * register + column % 2] = matrix[row, column]
    return flat.view(size, ranks)


def packed_awq(codes: Tensor) -> Tensor:
    """Codes [N, K] -> int32 [N / 4, K / 2]: words of 16 bits hold columns j, j + 8, j + 16 and j + 24 of 32."""
    (n, k), values = codes.shape, codes.tolist()
    words = torch.zeros(n // 4, k, dtype=torch.int32)
    for row in range(n):
        for column in range(k):
            place = 64 * (column // 64) + 16 * (row % 4) + 8 * (column % 64 // 32) + column % 8
            words[row // 4, place] |= values[row][column] << 4 * (column % 32 // 8)
    return words.to(torch.int16).view(torch.int32)


def int4_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -8 to 7 [N, K] and bfloat16 scales [N, K / 64]."""
    groups = weight.unflatten(1, (-1, 64))
    scale = (groups.abs().amax(dim=2, keepdim=True) / 7.5).bfloat16()
    codes = (groups / scale.float()).round().clamp(-8, 7)
    return codes.flatten(1).int(), scale.squeeze(2)


def nearest_e2m1(values: Tensor) -> Tensor:
    """The codes of values: the sign in the fourth bit."""
    index = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(dim=-1)
    return index + 8 * (values < 0)


def nvfp4_weight(weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """e2m1 codes [N, K] and e4m3 scales [N, K / 16] under a factor of all."""
    groups = weight.unflatten(1, (-1, 16)) / factor
    scale = (groups.abs().amax(dim=2, keepdim=True) / 6).to(torch.float8_e4m3fn)
    return nearest_e2m1(groups / scale.float()).flatten(1), scale.squeeze(2)
