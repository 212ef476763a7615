"""Q, K and V [B, L, H, Dh] as the codes that `kernels.attention` reads: rows of heads, filled up to whole blocks.

Q and K: int8 with one scale for 128 queries or 64 keys, K without its mean over the tokens (SageAttention2, arXiv
2411.10958). V: e4m3 with one scale per channel, transposed, for tensor cores take 8-bit factors along the summed
dimension alone; or float16. Codes and scales are those of `attention.quantized`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

_HEADS = (8, 4, 2, 1)
"""Heads that a program may take."""


@triton.jit
def _turn(
    values: tl.tensor,
    place: tl.tensor,
    tokens: tl.tensor,
    spread: tl.tensor,
    weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    PARTS: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """What `block.rms_rope` makes of values [BLOCK, DIM], before it is rounded. `spread` is [B * TOKENS, PARTS]."""
    head = place % HEADS
    inside = tokens < TOKENS
    pairs = tl.arange(0, DIM // 2)
    even, odd = tl.split(tl.reshape(values, (BLOCK, DIM // 2, 2)))
    if HAS_NORM:
        rows = (place // HEADS).to(tl.int64) * TOKENS + tokens
        by = tl.load(spread + rows * PARTS + head * PARTS // HEADS, mask=inside, other=0.0)
        at = weight + head % (HEADS // PARTS) * DIM + 2 * pairs
        even = even * by[:, None] * tl.load(at)[None, :]
        odd = odd * by[:, None] * tl.load(at + 1)[None, :]
    if HAS_ROPE:
        angle = tokens[:, None] * (DIM // 2) + pairs[None, :]
        cosine = tl.load(cosines + angle, mask=inside[:, None], other=0.0)
        sine = tl.load(sines + angle, mask=inside[:, None], other=0.0)
        even, odd = even * cosine - odd * sine, even * sine + odd * cosine
    return tl.reshape(tl.join(even, odd), (BLOCK, DIM))


@triton.jit
def _block(
    x: tl.tensor,
    place: tl.tensor,
    first: tl.tensor,
    spread: tl.tensor,
    weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    PARTS: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """[BLOCK, DIM] of head number `place`, of all samples', in float32; zeros beyond the last token."""
    start = x + (place // HEADS).to(tl.int64) * batch_stride + (place % HEADS) * head_stride
    tokens = first + tl.arange(0, BLOCK)
    at = start + tokens[:, None].to(tl.int64) * token_stride + tl.arange(0, DIM)[None, :]
    values = tl.load(at, mask=(tokens < TOKENS)[:, None], other=0.0).to(tl.float32)
    if HAS_NORM or HAS_ROPE:
        values = _turn(
            values, place, tokens, spread, weight, cosines, sines, TOKENS, HEADS, PARTS, HAS_NORM, HAS_ROPE, BLOCK, DIM
        )
        values = values.to(x.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def _channels_kernel(
    x: tl.tensor,
    out: tl.tensor,
    spread: tl.tensor,
    weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    PARTS: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    LARGEST: tl.constexpr,
    CHUNK: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """The sum, or the largest absolute value, of each channel over CHUNK tokens: out [chunks, B * H, DIM] float32."""
    chunk = tl.program_id(0)
    first_place = tl.program_id(1) * EACH
    heads = tl.arange(0, EACH)
    found = tl.zeros((EACH, DIM), dtype=tl.float32)
    for part in range(CHUNK // BLOCK):
        first = chunk * CHUNK + part * BLOCK
        for each in range(EACH):
            values = _block(
                x, first_place + each, first, spread, weight, cosines, sines, TOKENS, HEADS, PARTS,
                batch_stride, token_stride, head_stride, HAS_NORM, HAS_ROPE, BLOCK, DIM,
            )  # fmt: skip
            if LARGEST:
                more = tl.maximum(found, largest(values, 0)[None, :])
            else:
                more = found + tl.sum(values, 0)[None, :]
            found = tl.where((heads == each)[:, None], more, found)
    places = chunk * tl.num_programs(1) * EACH + first_place + heads
    tl.store(out + places.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :], found)


@triton.jit
def _scores_kernel(
    x: tl.tensor,
    mean: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    spread: tl.tensor,
    weight: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    TOKENS: tl.tensor,
    HEADS: tl.tensor,
    PARTS: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """int8 codes [B * H, filled, DIM] and scales [B * H, filled / BLOCK]."""
    block = tl.program_id(0)
    channels = tl.arange(0, DIM)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    for each in range(EACH):
        place = tl.program_id(1) * EACH + each
        values = _block(
            x, place, block * BLOCK, spread, weight, cosines, sines, TOKENS, HEADS, PARTS,
            batch_stride, token_stride, head_stride, HAS_NORM, HAS_ROPE, BLOCK, DIM,
        )  # fmt: skip
        if SMOOTH:
            values -= tl.load(mean + place * DIM + channels)[None, :]
            values = tl.where((tokens < TOKENS)[:, None], values, 0.0)
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
    values = _block(
        x, place, block * BLOCK, x, x, x, x, TOKENS, HEADS, 1,
        batch_stride, token_stride, head_stride, False, False, BLOCK, DIM,
    )  # fmt: skip
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


class Turn(NamedTuple):
    """RMS norm and rotary embedding that x [B, L, H, Dh] still waits for, as `block.rms_rope` computes them."""

    spread: Tensor | None = None
    """What the norm multiplies with, [B * L, 1] for one over all heads or [B * L, H]; None: there is none."""
    weight: Tensor | None = None
    """Float32 [H * Dh] or [Dh]."""
    cosines: Tensor | None = None
    """Float32 [L, Dh / 2]; None: there is no rotation."""
    sines: Tensor | None = None

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """What kernels take of it between x and the strides; what is not there is any tensor."""
        parts = 1 if self.spread is None else self.spread.shape[1]
        return *(x if table is None else table for table in self), x.shape[1], x.shape[2], parts

    def flags(self, places: int) -> dict[str, int]:
        """Constants of a kernel for `places` heads in all. A program takes several, which share cosines and sines:
        these are read once, and stay in registers."""
        each = max(size for size in _HEADS if places % size == 0) if self.cosines is not None else 1
        return {"HAS_NORM": self.spread is not None, "HAS_ROPE": self.cosines is not None, "EACH": each}


def _channels(x: Tensor, largest_value: bool, turn: Turn) -> Tensor:
    """The sum, or the largest absolute value, over the tokens of x [B, L, H, Dh]: [B * H, Dh] float32."""
    batch, tokens, heads, dim = x.shape
    chunks = triton.cdiv(tokens, _CHUNK)
    out = torch.empty(chunks, batch * heads, dim, dtype=torch.float32, device=x.device)
    flags = turn.flags(batch * heads)
    _channels_kernel[(chunks, batch * heads // flags["EACH"])](
        x, out, *turn.arguments(x), *x.stride()[:3], **flags,
        LARGEST=largest_value, CHUNK=_CHUNK, BLOCK=64, DIM=dim, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out.amax(dim=0) if largest_value else out.sum(dim=0)


def scores_codes(x: Tensor, block: int, smooth: bool, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """Queries or keys [B, L, H, Dh] -> int8 [B * H, filled, Dh], scales [B * H, filled / block] float32."""
    x, turn = _dense_channels(x), turn or Turn()
    batch, tokens, heads, dim = x.shape
    filled = _filled(tokens)
    codes = torch.empty(batch * heads, filled, dim, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch * heads, filled // block, dtype=torch.float32, device=x.device)
    mean = _channels(x, False, turn) / tokens if smooth else scales
    flags = turn.flags(batch * heads)
    _scores_kernel[(filled // block, batch * heads // flags["EACH"])](
        x, mean, codes, scales, *turn.arguments(x), *x.stride()[:3], **flags,
        SMOOTH=smooth, BLOCK=block, DIM=dim, num_warps=block // 16, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales


def values_codes(x: Tensor, eight: bool) -> tuple[Tensor, Tensor]:
    """Values [B, S, H, Dh] -> e4m3 [B * H, Dh, filled], or float16 [B * H, filled, Dh]; scales [B * H, Dh]."""
    x = _dense_channels(x)
    batch, tokens, heads, dim = x.shape
    filled = _filled(tokens)
    if eight:
        most = torch.full((), FP8_MAX, dtype=torch.float32, device=x.device)
        scales = _channels(x, True, Turn()) / most.expand(batch * heads, dim)
        codes = torch.empty(batch * heads, dim, filled, dtype=torch.float8_e4m3fn, device=x.device)
    else:
        scales = torch.ones(batch * heads, dim, dtype=torch.float32, device=x.device)
        codes = torch.empty(batch * heads, filled, dim, dtype=torch.float16, device=x.device)
    _values_kernel[(filled // KEYS, batch * heads)](
        x, scales, codes, tokens, heads, *x.stride()[:3], EIGHT=eight, BLOCK=KEYS, DIM=dim, num_warps=4
    )
    return codes, scales
