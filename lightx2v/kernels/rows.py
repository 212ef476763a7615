"""What programs that have one row each share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lightx2v.kernels.rounding import codes_of, factor_of, largest

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """GELU by tanh (Hendrycks & Gimpel 2016): (1 + tanh(u)) / 2 is the sigmoid of 2 u."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def store_row(
    out: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    multiplier: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.tensor,
    DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    INTEGER: tl.constexpr,
    MULTIPLIED: tl.constexpr,
) -> None:
    """A row of float32 values as DTYPE; as codes with a scale where LEVELS is not 0, times `multiplier` [WIDTH]."""
    values = values.to(DTYPE)
    if LEVELS != 0.0:
        values = values.to(tl.float32)
        if MULTIPLIED:
            by = tl.load(multiplier + columns, mask=columns < WIDTH, other=0.0)
            values = (values * by).to(DTYPE).to(tl.float32)
        amax = largest(values, 0)
        tl.store(scales + row, tl.div_rn(amax, LEVELS))
        values = codes_of(values, factor_of(amax, LEVELS), INTEGER)
    tl.store(out + row * WIDTH + columns, values, mask=columns < WIDTH)
