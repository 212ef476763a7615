"""What a transformer block computes between its products, one pass each, and the same followed by quantization.

Norms, rotations and the residual stream are float32. A quantized result is rounded to the dtype that it would have had
first, so that its codes are those of the two steps apart. A program has one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v.kernels.launch import row_warps
from lightx2v.kernels.quantize import levels_of
from lightx2v.kernels.rounding import codes_of, factor_of, largest
from lightx2v.quant.numerics import CODE_DTYPES

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ELEMENTS = 4096
"""Elements of a program that has no rows."""


@triton.jit
def _store_row(
    out: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.tensor,
    DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
) -> None:
    """A row of float32 values as DTYPE; as codes with a scale where LEVELS is not 0."""
    values = values.to(DTYPE)
    if LEVELS != 0.0:
        values = values.to(tl.float32)
        amax = largest(values, 0)
        tl.store(scales + row, tl.div_rn(amax, LEVELS))
        values = codes_of(values, factor_of(amax, LEVELS), INTEGER)
    tl.store(out + row * WIDTH + columns, values, mask=columns < WIDTH)


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    factor: tl.tensor,
    offset: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.tensor,
    TOKENS: tl.tensor,
    stride: tl.tensor,
    DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Layer norm of x [M, WIDTH] times `factor` plus `offset`: one of each for TOKENS rows, `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, values - tl.sum(values, 0) / WIDTH, 0.0)
    spread = tl.rsqrt(tl.sum(centered * centered, 0) / WIDTH + eps)
    place = row // TOKENS * stride + columns
    by, plus = tl.load(factor + place, mask=inside, other=0.0), tl.load(offset + place, mask=inside, other=0.0)
    _store_row(out, scales, centered * spread * by + plus, row, columns, WIDTH, DTYPE, LEVELS, INTEGER)


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    """GELU by tanh (Hendrycks & Gimpel 2016): (1 + tanh(u)) / 2 is the sigmoid of 2 u."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _gelu_rows_kernel(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    WIDTH: tl.tensor,
    stride: tl.tensor,
    DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """GELU of x [M, WIDTH], quantized by row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    _store_row(out, scales, _gelu(values), row, columns, WIDTH, DTYPE, LEVELS, INTEGER)


@triton.jit
def _gelu_kernel(x: tl.tensor, out: tl.tensor, COUNT: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < COUNT, other=0.0).to(tl.float32)
    tl.store(out + at, _gelu(values).to(out.dtype.element_ty), mask=at < COUNT)


@triton.jit
def _gated_kernel(
    x: tl.tensor,
    y: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.tensor,
    TOKENS: tl.tensor,
    stride: tl.tensor,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Float32 x [M, WIDTH] plus y times a gate."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = row * WIDTH + columns
    add = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        add *= tl.load(gate + row // TOKENS * stride + columns, mask=inside, other=0.0)
    tl.store(out + at, tl.load(x + at, mask=inside, other=0.0) + add, mask=inside)


@triton.jit
def _rope_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    PAIRS: tl.tensor,
    NORMED: tl.tensor,
    HALF: tl.tensor,
    TOKENS: tl.tensor,
    stride: tl.tensor,
    parts: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """RMS norm over NORMED pairs at a time and rotation of neighbouring components, of one row or a part of it."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    pairs = (program % parts) * NORMED + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < NORMED) & (pairs < PAIRS)
    columns = pairs[:, None] * 2 + tl.arange(0, 2)[None, :]
    values = tl.load(x + row * stride + columns, mask=inside[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(values)
    if HAS_NORM:
        spread = tl.rsqrt(tl.sum(even * even + odd * odd, 0) / (2 * NORMED) + eps)
        at = (pairs % NORMED)[:, None] * 2 + tl.arange(0, 2)[None, :]
        left, right = tl.split(tl.load(weight + at, mask=inside[:, None], other=0.0))
        even, odd = even * spread * left, odd * spread * right
    if HAS_ROPE:
        angle = row % TOKENS * HALF + pairs % HALF
        cosine = tl.load(cosines + angle, mask=inside, other=0.0)
        sine = tl.load(sines + angle, mask=inside, other=0.0)
        even, odd = even * cosine - odd * sine, even * sine + odd * cosine
    made = tl.join(even, odd).to(out.dtype.element_ty)
    tl.store(out + row * PAIRS * 2 + columns, made, mask=inside[:, None])


def _strided(table: Tensor, width: int) -> tuple[Tensor, int, int]:
    """A [D] or [B, 1, D] table, dense; how many it has, and how far they are apart."""
    table = table.contiguous()
    count = table.numel() // width
    return table, count, width if count > 1 else 0


def norm(
    x: Tensor, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype, kind: str | None
) -> tuple[Tensor, Tensor]:
    """Layer norm of float32 x [B, L, D] times `factor` plus `offset`, float32 [D] or [B, 1, D], as `dtype`.

    With `kind`, "int8" or "fp8", codes [B * L, D] of that and scales [B * L, 1]; without, the scales mean nothing.
    """
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    factor, count, stride = _strided(factor, width)
    offset, _, _ = _strided(offset, width)
    out = torch.empty((rows, width) if kind else x.shape, dtype=CODE_DTYPES[kind] if kind else dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        x, factor, offset, out, scales, eps, width, rows // count, stride,
        DTYPE=_TYPES[dtype], LEVELS=levels_of(kind) if kind else 0.0, INTEGER=kind == "int8", BLOCK=block,
        num_warps=row_warps(block), enable_fp_fusion=kind is None,
    )  # fmt: skip
    return out, scales


def gelu_codes(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of x [M, K], rounded to its dtype, as codes [M, K] of `kind` and scales [M, 1]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=CODE_DTYPES[kind], device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _gelu_rows_kernel[(rows,)](
        x, codes, scales, width, x.stride(0),
        DTYPE=_TYPES[x.dtype], LEVELS=levels_of(kind), INTEGER=kind == "int8", BLOCK=block,
        num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales


def gelu(x: Tensor) -> Tensor:
    """GELU (tanh) of a tensor."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _gelu_kernel[(triton.cdiv(x.numel(), _ELEMENTS),)](x, out, x.numel(), BLOCK=_ELEMENTS, num_warps=8)
    return out


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Float32 x [B, L, D] plus y [B, L, D] times a float32 gate [D] or [B, 1, D]."""
    x, y = x.contiguous(), y.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    table, count, stride = _strided(x[:0] if gate is None else gate, width)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _gated_kernel[(rows,)](
        x, y, table, out, width, rows // max(count, 1), stride,
        GATED=gate is not None, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return out


def rms_rope(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, heads: int, eps: float
) -> Tensor:
    """RMS norm of x [B, L, D] over the width of `weight`, then the rotary embedding of each head, as dtype of x."""
    batch, tokens, width = x.shape
    if x.stride(2) != 1 or (batch > 1 and x.stride(0) != tokens * x.stride(1)):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = (width if weight is None else weight.shape[0]) // 2
    parts = width // (2 * normed)
    block = triton.next_power_of_2(normed)
    tables = [out if table is None else table.contiguous() for table in (weight, cosines, sines)]
    _rope_kernel[(batch * tokens * parts,)](
        x, *tables, out, eps, width // 2, normed, width // heads // 2, tokens, x.stride(1), parts,
        HAS_NORM=weight is not None, HAS_ROPE=cosines is not None, BLOCK=block, num_warps=row_warps(2 * block),
    )  # fmt: skip
    return out
