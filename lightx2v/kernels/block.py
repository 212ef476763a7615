"""What a transformer block computes between its products, one pass each, and the same followed by quantization.

Norms, rotations and the residual stream are float32. A quantized result is rounded to the dtype that it would have had
first, so that its codes are those of the two steps apart. A program has one row. Nothing here is launched with fused
multiplications and additions: they round once, and so differently in each kernel that they are put into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v.kernels.launch import row_warps
from lightx2v.kernels.quantize import levels_of
from lightx2v.kernels.rows import TYPES, store_row
from lightx2v.kernels.rows import gelu as gelu_of
from lightx2v.quant.numerics import CODE_DTYPES

_ELEMENTS = 4096
"""Elements of a program that has no rows."""


@triton.jit
def _add_row(
    values: tl.tensor,
    y: tl.tensor,
    gate: tl.tensor,
    total: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.tensor,
    TOKENS: tl.tensor,
    stride: tl.tensor,
    GATED: tl.constexpr,
) -> tl.tensor:
    """A row of float32 values plus y times a gate, one for TOKENS rows, `stride` apart; stored in `total`."""
    inside = columns < WIDTH
    add = tl.load(y + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        add *= tl.load(gate + row // TOKENS * stride + columns, mask=inside, other=0.0)
    values += add
    tl.store(total + row * WIDTH + columns, values, mask=inside)
    return values


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    y: tl.tensor,
    gate: tl.tensor,
    factor: tl.tensor,
    offset: tl.tensor,
    multiplier: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.tensor,
    GATE_TOKENS: tl.tensor,
    gate_stride: tl.tensor,
    TOKENS: tl.tensor,
    stride: tl.tensor,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Layer norm of x [M, WIDTH], or of x plus y, times `factor` plus `offset`: one of each for TOKENS rows."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        values = _add_row(values, y, gate, total, row, columns, WIDTH, GATE_TOKENS, gate_stride, GATED)
    centered = tl.where(inside, values - tl.sum(values, 0) / WIDTH, 0.0)
    spread = tl.rsqrt(tl.sum(centered * centered, 0) / WIDTH + eps)
    place = row // TOKENS * stride + columns
    by, plus = tl.load(factor + place, mask=inside, other=0.0), tl.load(offset + place, mask=inside, other=0.0)
    made = centered * spread * by + plus
    store_row(out, scales, made, multiplier, row, columns, WIDTH, DTYPE, LEVELS, INTEGER, MULTIPLIED)


@triton.jit
def _gelu_kernel(x: tl.tensor, out: tl.tensor, COUNT: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < COUNT, other=0.0).to(tl.float32)
    tl.store(out + at, gelu_of(values).to(out.dtype.element_ty), mask=at < COUNT)


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
    values = tl.load(x + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    _add_row(values, y, gate, out, row, columns, WIDTH, TOKENS, stride, GATED)


@triton.jit
def _spread(even: tl.tensor, odd: tl.tensor, NORMED: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """What a row, or a part of one, of NORMED pairs is multiplied with to have a root mean square of 1."""
    return tl.rsqrt(tl.sum(even * even + odd * odd, 0) / (2 * NORMED) + eps)


@triton.jit
def _spread_kernel(
    x: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    NORMED: tl.tensor,
    stride: tl.tensor,
    parts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """out [M, parts]: that of each row, or of each part."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, 2 * BLOCK)
    at = x + program // parts * stride + program % parts * (2 * NORMED) + columns
    values = tl.load(at, mask=columns < 2 * NORMED, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (BLOCK, 2)))
    tl.store(out + program, _spread(even, odd, NORMED, eps))


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
    within = tl.arange(0, BLOCK)
    pairs = (program % parts) * NORMED + within
    inside = within < NORMED
    flat = tl.arange(0, 2 * BLOCK)  # flat, for loads and stores of 16 bytes
    columns = (program % parts) * (2 * NORMED) + flat
    values = tl.load(x + row * stride + columns, mask=flat < 2 * NORMED, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (BLOCK, 2)))
    if HAS_NORM:
        spread = _spread(even, odd, NORMED, eps)
        by = tl.load(weight + flat, mask=flat < 2 * NORMED, other=0.0)
        left, right = tl.split(tl.reshape(by, (BLOCK, 2)))
        even, odd = even * spread * left, odd * spread * right
    if HAS_ROPE:
        angle = row % TOKENS * HALF + pairs % HALF
        cosine = tl.load(cosines + angle, mask=inside, other=0.0)
        sine = tl.load(sines + angle, mask=inside, other=0.0)
        even, odd = even * cosine - odd * sine, even * sine + odd * cosine
    made = tl.reshape(tl.join(even, odd), (2 * BLOCK,)).to(out.dtype.element_ty)
    tl.store(out + row * PAIRS * 2 + columns, made, mask=flat < 2 * NORMED)


def _strided(table: Tensor | None, rows: int, width: int, like: Tensor) -> tuple[Tensor, int, int]:
    """A [D] or [B, 1, D] table, dense; the rows that each of it is for, and how far they are apart.

    None, for which the kernel does not look, is any tensor.
    """
    if table is None:
        return like, rows, 0
    table = table.contiguous()
    count = table.numel() // width
    return table, rows // count, width if count > 1 else 0


def norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    factor: Tensor,
    offset: Tensor,
    multiplier: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of float32 x [B, L, D] times `factor` plus `offset`, float32 [D] or [B, 1, D], as `dtype`.

    With y [B, L, D] the norm is of x plus y, times `gate` if there is one, and that sum is the first result. The second
    is the norm; with `kind`, "int8" or "fp8", codes [B * L, D] of it times `multiplier`, float32 [D], under scales
    [B * L, 1], the third. Results that are not asked for mean nothing.
    """
    x, y = x.contiguous(), None if y is None else y.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    gates, *gate_steps = _strided(gate, rows, width, x)
    factor, *steps = _strided(factor, rows, width, x)
    offset, *_ = _strided(offset, rows, width, x)
    out = torch.empty((rows, width) if kind else x.shape, dtype=CODE_DTYPES[kind] if kind else dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    total = scales if y is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        x, x if y is None else y, gates, factor, offset, x if multiplier is None else multiplier, total, out, scales,
        eps, width, *gate_steps, *steps,
        ADDED=y is not None, GATED=gate is not None, MULTIPLIED=multiplier is not None, DTYPE=TYPES[dtype],
        LEVELS=levels_of(kind) if kind else 0.0, INTEGER=kind == "int8", BLOCK=block,
        num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return total, out, scales


def gelu(x: Tensor) -> Tensor:
    """GELU (tanh) of a tensor."""
    x = x.contiguous()
    out = torch.empty_like(x)
    programs = triton.cdiv(x.numel(), _ELEMENTS)
    _gelu_kernel[(programs,)](x, out, x.numel(), BLOCK=_ELEMENTS, num_warps=8, enable_fp_fusion=False)
    return out


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Float32 x [B, L, D] plus y [B, L, D] times a float32 gate [D] or [B, 1, D]."""
    x, y = x.contiguous(), y.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    table, tokens, stride = _strided(gate, rows, width, x)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _gated_kernel[(rows,)](
        x, y, table, out, width, tokens, stride,
        GATED=gate is not None, BLOCK=block, num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _even_rows(x: Tensor) -> Tensor:
    """x [B, L, D] with rows that are all as far apart."""
    batch, tokens, _ = x.shape
    uneven = x.stride(2) != 1 or (batch > 1 and x.stride(0) != tokens * x.stride(1))
    return x.contiguous() if uneven else x


def rms_spread(x: Tensor, normed: int, eps: float) -> Tensor:
    """What an RMS norm of `normed` channels at a time multiplies with: x [B, L, D] -> float32 [B * L, D / normed]."""
    x = _even_rows(x)
    batch, tokens, width = x.shape
    out = torch.empty(batch * tokens, width // normed, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(normed // 2)
    _spread_kernel[(out.numel(),)](
        x, out, eps, normed // 2, x.stride(1), out.shape[1],
        BLOCK=block, num_warps=row_warps(2 * block), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def rms_rope(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, heads: int, eps: float
) -> Tensor:
    """RMS norm of x [B, L, D] over the width of `weight`, then the rotary embedding of each head, as dtype of x."""
    x = _even_rows(x)
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = (width if weight is None else weight.shape[0]) // 2
    parts = width // (2 * normed)
    block = triton.next_power_of_2(normed)
    tables = [out if table is None else table.contiguous() for table in (weight, cosines, sines)]
    _rope_kernel[(batch * tokens * parts,)](
        x, *tables, out, eps, width // 2, normed, width // heads // 2, tokens, x.stride(1), parts,
        HAS_NORM=weight is not None, HAS_ROPE=cosines is not None, BLOCK=block,
        num_warps=row_warps(2 * block), enable_fp_fusion=False,
    )  # fmt: skip
    return out
