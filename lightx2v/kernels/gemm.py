"""Products of 8-bit codes: A [M, K] times B [N, K] transposed, with float32 scales and a float32 bias, persistent.

A program stays on its multiprocessor and takes one output tile after the other. Tiles go column by column through
groups of `GROUP` rows of tiles, so that what the programs of a moment read fits the L2 cache. Tiles of A and B come by
the tensor copy engine where there is one (compute capability 9.0), by pointers elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v.kernels.launch import copies_tensors, persistent_programs
from lightx2v.kernels.tiles import Tile


@triton.jit
def _place(tile: tl.tensor, TILES_M: tl.tensor, TILES_N: tl.tensor, GROUP: tl.constexpr) -> tl.tuple:
    """Row and column of tile number `tile`."""
    group = tile // (GROUP * TILES_N)
    first = group * GROUP
    height = min(TILES_M - first, GROUP)
    within = tile - group * (GROUP * TILES_N)
    return first + within % height, within // height


@triton.jit
def _tile(
    source: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    ROWS: tl.tensor,
    K: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tl.tensor:
    """[HEIGHT, WIDTH] of a row-major [ROWS, K]; zeros in columns beyond K."""
    if DESCRIPTORS:
        return source.load([row, column])
    else:
        rows = row + tl.arange(0, HEIGHT)
        columns = column + tl.arange(0, WIDTH)
        # Rows beyond the last give results that are not stored, so they may be those of any row.
        rows = tl.where(rows < ROWS, rows, 0).to(tl.int64)
        return tl.load(source + rows[:, None] * K + columns[None, :], mask=columns[None, :] < K, other=0.0)


@triton.jit
def _finish(
    out: tl.tensor,
    values: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> None:
    """Add the bias to a tile [HEIGHT, WIDTH] in float32, round it and store it."""
    columns = column + tl.arange(0, WIDTH)
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
    if DESCRIPTORS:
        out.store([row, column], values.to(out.dtype))
    else:
        rows = row + tl.arange(0, HEIGHT)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        at = out + rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])  # one compilation for any number of tokens
def _gemm_kernel(
    a: tl.tensor,
    b: tl.tensor,
    out: tl.tensor,
    a_scale: tl.tensor,
    b_scale: tl.tensor,
    bias: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    a_scale_stride: tl.tensor,
    PROGRAMS: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
) -> None:
    """Scales [M] of rows and [N] of columns, applied to the whole sum; with BLOCKS scales of blocks of 128.

    Those are a_scale [M, K/128] with contiguous columns and b_scale [N/128, K/128], K a multiple of 128, BLOCK_K 128,
    BLOCK_N a part of it. Two levels (DeepSeek-V3, arXiv 2412.19437): what tensor cores sum over 128 codes is scaled,
    then added in float32.
    """
    TILES_M = tl.cdiv(M, BLOCK_M)
    TILES_N = tl.cdiv(N, BLOCK_N)
    STEPS = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), TILES_M * TILES_N, PROGRAMS, flatten=DESCRIPTORS):
        place_m, place_n = _place(tile, TILES_M, TILES_N, GROUP)
        row = place_m * BLOCK_M
        column = place_n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
        for step in range(STEPS):
            left = _tile(a, row, step * BLOCK_K, M, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
            right = _tile(b, column, step * BLOCK_K, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS)
            if BLOCKS:
                by_row = tl.load(a_scale + step * a_scale_stride + rows, mask=rows < M, other=0.0)
                by_block = tl.load(b_scale + (column // 128) * STEPS + step)
                total += tl.dot(left, right.T) * (by_row * by_block)[:, None]
            else:
                total = tl.dot(left, right.T, total, out_dtype=total.dtype)
        values = total.to(tl.float32)
        if not BLOCKS:
            columns = column + tl.arange(0, BLOCK_N)
            by_column = tl.load(b_scale + columns, mask=columns < N, other=0.0)
            values = values * by_column[None, :] * tl.load(a_scale + rows, mask=rows < M, other=0.0)[:, None]
        if HALVES:
            pair = tl.permute(tl.reshape(values, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            first, second = tl.split(pair)
            _finish(out, first, bias, row, column, M, N, HAS_BIAS, BLOCK_M, BLOCK_N // 2, DESCRIPTORS)
            column += BLOCK_N // 2
            _finish(out, second, bias, row, column, M, N, HAS_BIAS, BLOCK_M, BLOCK_N // 2, DESCRIPTORS)
        else:
            _finish(out, values, bias, row, column, M, N, HAS_BIAS, BLOCK_M, BLOCK_N, DESCRIPTORS)


def _operands(a: Tensor, b: Tensor, out: Tensor, tile: Tile) -> tuple[Any, Any, Any, bool]:
    """What a kernel takes for A, B and the result: descriptors where the tile asks for them and all rows allow them."""
    aligned = all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (a, b, out))
    if not (tile.descriptors and aligned and copies_tensors(a.device)):
        return a, b, out, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(a, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(b, [tile.block_n, tile.block_k]),
        TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_n // (2 if tile.halves else 1)]),
        True,
    )


def multiply_rows(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile
) -> Tensor:
    """a [M, K] and b [N, K], both int8 or e4m3, scales [M] and [N]: [M, N] in `dtype`.

    int8 is summed exactly. e4m3 is summed as the tensor cores do: on Hopper with fewer bits than float32 has.
    """
    return _multiply(a, b, a_scale, b_scale, bias, dtype, tile, blocks=False)


def multiply_blocks(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile
) -> Tensor:
    """e4m3 a [M, K] and b [N, K], K a multiple of 128, a_scale [M, K/128], b_scale [ceil(N/128), K/128]: [M, N].

    `tile` is one of `tiles.block_candidates`.
    """
    if a_scale.stride(0) != 1:
        a_scale = a_scale.t().contiguous().t()
    return _multiply(a, b, a_scale, b_scale, bias, dtype, tile, blocks=True)


def _multiply(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    blocks: bool,
) -> Tensor:
    rows, k = a.shape
    columns = b.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    left, right, result, descriptors = _operands(a, b, out, tile)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    programs = persistent_programs(a.device, tiles)
    _gemm_kernel[(programs,)](
        left, right, result, a_scale, b_scale, b_scale if bias is None else bias,
        rows, columns, k, a_scale.stride(1) if blocks else 0,
        PROGRAMS=programs, INTEGER=a.dtype == torch.int8, BLOCKS=blocks, HAS_BIAS=bias is not None,
        DESCRIPTORS=descriptors, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=tile.group,
        HALVES=tile.halves, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
