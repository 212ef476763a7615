"""Attention on 8-bit codes: int8 Q K^T, the online softmax in float32, and P V in e4m3 or in float16.

Two levels of accumulation: the tensor cores sum P V over one tile of keys, and float32 registers over all tiles, for
Hopper's own sums of e4m3 products keep fewer bits (SageAttention2, arXiv 2411.10958; FlashAttention-3, arXiv
2407.08608). A program has one block of queries of one head. Rounding of P is relative to the maximum so far, so results
differ in the last bits with the size of the tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v.kernels.attention_codes import KEYS, QUERIES, Turn, scores_codes, values_codes
from lightx2v.kernels.launch import copies_tensors
from lightx2v.kernels.tiles import Tile

LOG2_E = 1.4426950408889634
HEAD_DIMS = (64, 128)


@triton.jit
def _load(
    source: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    stride: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tl.tensor:
    """[HEIGHT, WIDTH] of rows that are `stride` apart; codes are filled up to whole tiles."""
    if DESCRIPTORS:
        return source.load([row, column])
    else:
        rows = (row + tl.arange(0, HEIGHT)).to(tl.int64)
        return tl.load(source + rows[:, None] * stride + (column + tl.arange(0, WIDTH))[None, :])


@triton.jit
def _step(
    total: tl.tensor,
    sums: tl.tensor,
    top: tl.tensor,
    query: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_scale: tl.tensor,
    factor: tl.tensor,
    place: tl.tensor,
    start: tl.tensor,
    LENGTH: tl.tensor,
    filled: tl.tensor,
    LAST: tl.constexpr,
    EIGHT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tuple:
    """Take one tile of keys and values in: total [M, DIM], sums [M] and maxima [M] of the weights so far."""
    columns = tl.arange(0, BLOCK_N)
    key = _load(k, place * filled + start, 0, DIM, BLOCK_N, DIM, DESCRIPTORS)
    scores = tl.dot(query, key.T, out_dtype=tl.int32).to(tl.float32)
    if BLOCK_N == 64:
        scores *= factor * tl.load(k_scale + start // 64)
    else:
        scores *= (factor * tl.load(k_scale + (start + columns) // 64))[None, :]
    if LAST:
        scores = tl.where((start + columns < LENGTH)[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    correction = tl.exp2(top - highest)
    total *= correction[:, None]
    if EIGHT:
        weights = tl.exp2(scores - highest[:, None] + 8.807354922057604)  # times 448, the largest e4m3
        value = _load(v, place * DIM, start, filled, DIM, BLOCK_N, DESCRIPTORS)
        total = tl.dot(weights.to(tl.float8e4nv), value.T, total, max_num_imprecise_acc=BLOCK_N)
    else:
        weights = tl.exp2(scores - highest[:, None])
        value = _load(v, place * filled + start, 0, DIM, BLOCK_N, DIM, DESCRIPTORS)
        total = tl.dot(weights.to(tl.float16), value, total)
    return total, sums * correction + tl.sum(weights, 1), highest


@triton.jit(do_not_specialize=["QUERY_COUNT", "LENGTH", "HEADS"])  # one compilation for any number of tokens
def _attend_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    q_scale: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    scale: tl.tensor,
    QUERY_COUNT: tl.tensor,
    LENGTH: tl.tensor,
    q_filled: tl.tensor,
    filled: tl.tensor,
    HEADS: tl.tensor,
    EIGHT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """out [B, L, H, DIM], dense, of codes as `kernels.attention_codes` makes them."""
    first = tl.program_id(0) * BLOCK_M
    place = tl.program_id(1)
    query = _load(q, place * q_filled + first, 0, DIM, BLOCK_M, DIM, DESCRIPTORS)
    factor = tl.load(q_scale + (place * q_filled + first) // 128) * scale
    k_scale += place * (filled // 64)
    total = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    whole = LENGTH // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        total, sums, top = _step(
            total, sums, top, query, k, v, k_scale, factor, place, start, LENGTH, filled,
            False, EIGHT, DESCRIPTORS, BLOCK_N, DIM,
        )  # fmt: skip
    if whole < LENGTH:
        total, sums, top = _step(
            total, sums, top, query, k, v, k_scale, factor, place, whole, LENGTH, filled,
            True, EIGHT, DESCRIPTORS, BLOCK_N, DIM,
        )  # fmt: skip
    channels = tl.arange(0, DIM)
    total = total / sums[:, None]
    if EIGHT:
        total *= tl.load(v_scale + place * DIM + channels)[None, :]
    rows = first + tl.arange(0, BLOCK_M)
    at = ((place // HEADS).to(tl.int64) * QUERY_COUNT + rows) * HEADS + place % HEADS
    tl.store(
        out + at[:, None] * DIM + channels[None, :], total.to(out.dtype.element_ty), mask=(rows < QUERY_COUNT)[:, None]
    )


def _sources(q: Tensor, k: Tensor, v: Tensor, eight: bool, tile: Tile) -> tuple[Any, Any, Any, bool]:
    """Codes as the kernel takes them: all rows of all heads, behind descriptors where there is a copy engine."""
    flat = [codes.flatten(0, 1) for codes in (q, k, v)]
    if not (tile.descriptors and copies_tensors(q.device)):
        return flat[0], flat[1], flat[2], False
    from triton.tools.tensor_descriptor import TensorDescriptor

    dim = q.shape[2]
    shapes = ([tile.block_m, dim], [tile.block_n, dim], [dim, tile.block_n] if eight else [tile.block_n, dim])
    left, middle, right = (
        TensorDescriptor.from_tensor(codes, shape) for codes, shape in zip(flat, shapes, strict=True)
    )
    return left, middle, right, True


Codes = tuple[Tensor, Tensor]


def encode(
    q: Tensor, k: Tensor, v: Tensor, eight: bool, q_turn: Turn | None = None, k_turn: Turn | None = None
) -> tuple[Codes, Codes, Codes]:
    """Codes and scales of q [B, L, H, Dh] and of k and v [B, S, H, Dh], K smoothed; q and k after their turns."""
    return scores_codes(q, QUERIES, False, q_turn), scores_codes(k, KEYS, True, k_turn), values_codes(v, eight)


def attend(q: Codes, k: Codes, v: Codes, like: Tensor, keys: int, scale: float, eight: bool, tile: Tile) -> Tensor:
    """Attention of codes over the first `keys` keys: a dense tensor of the shape and dtype of `like` [B, L, H, Dh]."""
    batch, queries, heads, dim = like.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    left, middle, right, descriptors = _sources(q[0], k[0], v[0], eight, tile)
    _attend_kernel[(triton.cdiv(queries, tile.block_m), batch * heads)](
        left, middle, right, out, q[1], k[1], v[1], scale * LOG2_E,
        queries, keys, q[0].shape[1], k[0].shape[1], heads,
        EIGHT=eight, DESCRIPTORS=descriptors, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DIM=dim,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
