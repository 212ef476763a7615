"""Q, K and V [B, L, H, Dh] as the codes that `kernels.attention` reads: rows of heads, filled up to whole blocks.

Q and K: int8 with one scale for 128 queries or 64 keys, K without its mean over the tokens (SageAttention2, arXiv
2411.10958). V: e4m3 with one scale per channel, transposed, for tensor cores take 8-bit factors along the summed
dimension alone; or float16. Codes and scales are those of `attention.quantized`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v.kernels.rounding import largest, nearest
from lightx2v.quant.numerics import FP8_MAX

QUERIES, KEYS = 128, 64
"""Tokens that share a scale."""
FILLED = 128
"""Multiple of tokens that codes are filled up to, with zeros."""
_CHUNK = 256
"""Tokens of which one program finds the sum or the largest value of each channel."""


@triton.jit
def _block(
    x: tl.tensor,
    first: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """[BLOCK, DIM] of the head that program axis 1 names, float32; zeros beyond the last token."""
    place = tl.program_id(1)
    start = x + (place // HEADS).to(tl.int64) * batch_stride + (place % HEADS) * head_stride
    tokens = first + tl.arange(0, BLOCK)
    at = start + tokens[:, None].to(tl.int64) * token_stride + tl.arange(0, DIM)[None, :]
    return tl.load(at, mask=(tokens < TOKENS)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _channels_kernel(
    x: tl.tensor,
    out: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    LARGEST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """The sum, or the largest absolute value, of each channel over CHUNK tokens: out [chunks, B * H, DIM] float32."""
    chunk = tl.program_id(0)
    found = tl.zeros((DIM,), dtype=tl.float32)
    for part in range(CHUNK // BLOCK):
        first = chunk * CHUNK + part * BLOCK
        values = _block(x, first, TOKENS, HEADS, batch_stride, token_stride, head_stride, BLOCK, DIM)
        if LARGEST:
            found = tl.maximum(found, largest(values, 0))
        else:
            found += tl.sum(values, 0)
    at = (chunk * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * DIM
    tl.store(out + at + tl.arange(0, DIM), found)


@triton.jit
def _scores_kernel(
    x: tl.tensor,
    mean: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """int8 codes [B * H, filled, DIM] and scales [B * H, filled / BLOCK]."""
    block = tl.program_id(0)
    place = tl.program_id(1)
    values = _block(x, block * BLOCK, TOKENS, HEADS, batch_stride, token_stride, head_stride, BLOCK, DIM)
    channels = tl.arange(0, DIM)
    if SMOOTH:
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.where((tokens < TOKENS)[:, None], values - tl.load(mean + place * DIM + channels)[None, :], 0.0)
    scale = tl.div_rn(tl.max(largest(values, 1), 0), 127.0)
    made = nearest(tl.div_rn(values, tl.where(scale == 0.0, 1.0, scale)))
    tl.store(scales + place * tl.num_programs(0) + block, scale)
    rows = (place.to(tl.int64) * tl.num_programs(0) + block) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + rows[:, None] * DIM + channels[None, :], made.to(tl.int8))


@triton.jit
def _values_kernel(
    x: tl.tensor,
    scales: tl.tensor,
    codes: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    EIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """e4m3 codes [B * H, DIM, filled] under scales [B * H, DIM], or float16 [B * H, filled, DIM]."""
    block = tl.program_id(0)
    place = tl.program_id(1).to(tl.int64)
    values = _block(x, block * BLOCK, TOKENS, HEADS, batch_stride, token_stride, head_stride, BLOCK, DIM)
    channels = tl.arange(0, DIM)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    filled = tl.num_programs(0) * BLOCK
    if EIGHT:
        scale = tl.load(scales + place * DIM + channels)
        made = tl.div_rn(values, tl.where(scale == 0.0, 1.0, scale)[None, :]).to(tl.float8e4nv)
        at = (place * DIM + channels)[:, None] * filled + tokens[None, :]
        tl.store(codes + at, tl.trans(made))
    else:
        tl.store(codes + (place * filled + tokens)[:, None] * DIM + channels[None, :], values.to(tl.float16))


def _filled(tokens: int) -> int:
    return -(-tokens // FILLED) * FILLED


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _channels(x: Tensor, largest_value: bool) -> Tensor:
    """The sum, or the largest absolute value, over the tokens of x [B, L, H, Dh]: [B * H, Dh] float32."""
    batch, tokens, heads, dim = x.shape
    chunks = triton.cdiv(tokens, _CHUNK)
    out = torch.empty(chunks, batch * heads, dim, dtype=torch.float32, device=x.device)
    _channels_kernel[(chunks, batch * heads)](
        x, out, tokens, heads, *x.stride()[:3],
        LARGEST=largest_value, CHUNK=_CHUNK, BLOCK=64, DIM=dim, num_warps=4,
    )  # fmt: skip
    return out.amax(dim=0) if largest_value else out.sum(dim=0)


def scores_codes(x: Tensor, block: int, smooth: bool) -> tuple[Tensor, Tensor]:
    """Queries or keys [B, L, H, Dh] -> int8 [B * H, filled, Dh], scales [B * H, filled / block] float32."""
    x = _dense_channels(x)
    batch, tokens, heads, dim = x.shape
    filled = _filled(tokens)
    codes = torch.empty(batch * heads, filled, dim, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch * heads, filled // block, dtype=torch.float32, device=x.device)
    mean = _channels(x, largest_value=False) / tokens if smooth else scales
    _scores_kernel[(filled // block, batch * heads)](
        x, mean, codes, scales, tokens, heads, *x.stride()[:3],
        SMOOTH=smooth, BLOCK=block, DIM=dim, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales


def values_codes(x: Tensor, eight: bool) -> tuple[Tensor, Tensor]:
    """Values [B, S, H, Dh] -> e4m3 [B * H, Dh, filled], or float16 [B * H, filled, Dh]; scales [B * H, Dh]."""
    x = _dense_channels(x)
    batch, tokens, heads, dim = x.shape
    filled = _filled(tokens)
    if eight:
        most = torch.full((), FP8_MAX, dtype=torch.float32, device=x.device)
        scales = _channels(x, largest_value=True) / most.expand(batch * heads, dim)
        codes = torch.empty(batch * heads, dim, filled, dtype=torch.float8_e4m3fn, device=x.device)
    else:
        scales = torch.ones(batch * heads, dim, dtype=torch.float32, device=x.device)
        codes = torch.empty(batch * heads, filled, dim, dtype=torch.float16, device=x.device)
    _values_kernel[(filled // KEYS, batch * heads)](
        x, scales, codes, tokens, heads, *x.stride()[:3], EIGHT=eight, BLOCK=KEYS, DIM=dim, num_warps=4
    )
    return codes, scales
