"""Activations [M, K] to codes and scales: one scale for each token, or for each 128 values of one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v.kernels.launch import row_warps
from lightx2v.kernels.rounding import codes_of, factor_of, largest
from lightx2v.kernels.rows import TYPES, gelu, store_row
from lightx2v.quant.numerics import CODE_DTYPES, FP8_MAX, INT8_MAX, Quantized

GROUP = 128
_COLUMNS = 2048
"""Columns of groups that one program takes."""
_ALIGNED = 4
"""float32 scales in the 16 bytes that columns of scales are aligned to."""


def levels_of(dtype: str) -> float:
    """What the largest value becomes: of "int8" or "fp8"."""
    return float(INT8_MAX) if dtype == "int8" else FP8_MAX


@triton.jit
def _tokens(
    x: tl.tensor,
    beside: tl.tensor,
    multiplier: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
    beside_stride: tl.tensor,
    FIRST: tl.tensor,
    K: tl.tensor,
    GELU: tl.constexpr,
    JOINED: tl.constexpr,
    DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [M, K], or its GELU, -> codes [M, K], scales [M]. A program has a row, which it reads once.

    JOINED: the first FIRST columns are those of `beside`, without the GELU, and x has the others.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    if JOINED:
        inside &= columns >= FIRST
    values = tl.load(x + row * stride + columns - FIRST, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        values = gelu(values)
    if JOINED:
        others = tl.load(beside + row * beside_stride + columns, mask=columns < FIRST, other=0.0).to(tl.float32)
        values = tl.where(columns < FIRST, others, values)
    store_row(codes, scales, values, multiplier, row, columns, K, DTYPE, LEVELS, INTEGER, MULTIPLIED)


@triton.jit
def _groups(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
    scale_stride: tl.tensor,
    K: tl.tensor,
    FILLED: tl.tensor,
    LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """x [M, K] -> codes [M, FILLED], scales [M, FILLED / 128] whose columns are `scale_stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    values = tl.load(x + row * stride + columns, mask=columns < K, other=0.0).to(tl.float32)
    amax = largest(values, 1)
    tl.store(scales + row + groups * scale_stride, tl.div_rn(amax, LEVELS), mask=groups * 128 < FILLED)
    made = codes_of(values, factor_of(amax, LEVELS)[:, None], INTEGER)
    tl.store(codes + row * FILLED + columns, made, mask=columns < FILLED)


def quantize_tokens(
    x: Tensor, dtype: str, gelu: bool = False, multiplier: Tensor | None = None, beside: Tensor | None = None
) -> Quantized:
    """x [M, K] of any floating dtype -> codes [M, K] of "int8" or "fp8", scales [M, 1] float32.

    With `gelu` they are of the GELU (tanh) of x, with a float32 `multiplier` [K] of that times it; each is rounded to
    the dtype of x, as it would be between two passes. `beside` [M, K'] of that dtype goes in front of the GELU, as it
    is: codes [M, K' + K].
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    first = 0
    if beside is not None:
        beside = beside if beside.stride(-1) == 1 else beside.contiguous()
        first = beside.shape[1]
        columns += first
    codes = torch.empty(rows, columns, dtype=CODE_DTYPES[dtype], device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _tokens[(rows,)](
        x, x if beside is None else beside, scales if multiplier is None else multiplier, codes, scales,
        x.stride(0), 0 if beside is None else beside.stride(0), first, columns,
        GELU=gelu, JOINED=beside is not None, DTYPE=TYPES[x.dtype], LEVELS=levels_of(dtype), INTEGER=dtype == "int8",
        MULTIPLIED=multiplier is not None, BLOCK=block, num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return Quantized(codes, scales)


def scales_of_groups(rows: int, columns: int, device: torch.device) -> Tensor:
    """Uninitialized float32 [rows, ceil(columns / 128)], each column contiguous and 16-byte aligned."""
    aligned = -(-rows // _ALIGNED) * _ALIGNED
    return torch.empty_strided((rows, -(-columns // GROUP)), (1, aligned), dtype=torch.float32, device=device)


def quantize_groups(x: Tensor, dtype: str) -> Quantized:
    """x [M, K] -> codes [M, K filled up to whole groups of 128], scales [M, groups] with contiguous columns."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    filled = -(-columns // GROUP) * GROUP
    codes = torch.empty(rows, filled, dtype=CODE_DTYPES[dtype], device=x.device)
    scales = scales_of_groups(rows, columns, x.device)
    block = min(_COLUMNS, triton.next_power_of_2(filled))
    _groups[(rows, triton.cdiv(filled, block))](
        x, codes, scales, x.stride(0), scales.stride(1), columns, filled,
        LEVELS=levels_of(dtype), INTEGER=dtype == "int8", GROUPS=block // GROUP,
        num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return Quantized(codes, scales)
