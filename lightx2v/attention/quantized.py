"""8-bit attention in plain torch, on any device: what it costs in quality can be measured without the GPU it is for.

`sage_ref_int8_fp8`, `sage_ref_int8_fp16`: SageAttention2 (arXiv 2411.10958): Q and K in int8 with one scale for 128
queries and 64 keys, K without its mean over the tokens; P and V in e4m3, V with a scale per channel and P times 448, or
both in float16. `fp8_ref`: Q, K, V in e4m3 with one scale per head, P times 256, as FlashAttention-3 has it
(arXiv 2407.08608), but K smoothed likewise: what `flash_attn3_fp8` computes. `fp8_block_ref`: the same with a scale for
each block of tokens. `_unsmoothed`: K with its mean.

All run the online softmax over blocks of 64 keys in float32, so that P is rounded relative to the maximum so far, and
the product of each block is added to float32 sums: the two levels of accumulation of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.attention.base import Backend
from lightx2v.attention.kernel import maskless
from lightx2v.quant.numerics import FP8_MAX, INT8_MAX

QUERIES, KEYS = 128, 64
"""Tokens of a block."""


@dataclass(frozen=True)
class Recipe:
    """What is rounded to what."""

    scores: torch.dtype
    """Of Q and K: int8 or float8_e4m3fn."""
    values: torch.dtype
    """Of P and V: float8_e4m3fn or float16."""
    blocks: bool = True
    """Q and K, and V in FP8 scores, have a scale per block of tokens, else one per head."""
    smooth: bool = True
    most: float = FP8_MAX
    """What a P of 1 becomes in e4m3."""


def smooth(k: Tensor) -> Tensor:
    """Keys [B, S, H, Dh] without their mean over the tokens, which adds the same to all scores of a query."""
    return k - k.mean(dim=1, keepdim=True, dtype=torch.float32).to(k.dtype)


def rounded(x: Tensor, dtype: torch.dtype, amax: Tensor) -> tuple[Tensor, Tensor]:
    """`x` as codes of int8 or e4m3, and their scale amax / 127 or 448; where that is 0 the codes are."""
    most = float(INT8_MAX) if dtype == torch.int8 else FP8_MAX
    scale = amax.float() / most
    values = x.float() / torch.where(scale == 0, 1.0, scale)
    values = values.round().clamp(-most, most) if dtype == torch.int8 else values.clamp(-most, most)
    return values.to(dtype), scale


def heads_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L, H, Dh] as e4m3 with one float32 scale [B, H] for each head."""
    codes, scale = rounded(x, torch.float8_e4m3fn, x.abs().amax(dim=(1, 3), keepdim=True))
    return codes, scale[:, 0, :, 0]


def _codes(x: Tensor, dtype: torch.dtype, block: int | None) -> Tensor:
    """What codes and scale of x [B, H, L, Dh] stand for, float32, with a scale per block of tokens or per head.

    A kernel multiplies the codes, exactly, and then by the scales: the difference is float32's own rounding.
    """
    tokens = x.shape[2]
    if block is None:
        codes, scale = rounded(x, dtype, x.abs().amax(dim=(2, 3), keepdim=True))
        return codes.float() * scale
    parts = F.pad(x, (0, 0, 0, -tokens % block)).unflatten(2, (-1, block))
    codes, scale = rounded(parts, dtype, parts.abs().amax(dim=(3, 4), keepdim=True))
    return (codes.float() * scale).flatten(2, 3)[:, :, :tokens]


def _attend(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh] in q's dtype."""
    dtype = q.dtype
    q, k, v = q.float().transpose(1, 2), k.float(), v.float().transpose(1, 2)
    k = (smooth(k) if recipe.smooth else k).transpose(1, 2)
    q = _codes(q, recipe.scores, QUERIES if recipe.blocks else None)
    k = _codes(k, recipe.scores, KEYS if recipe.blocks else None)
    eight = recipe.values == torch.float8_e4m3fn
    most = recipe.most if eight else 1.0
    if not eight:
        v = v.half().float()
    elif recipe.scores == torch.int8:
        codes, per_channel = rounded(v, recipe.values, v.abs().amax(dim=2, keepdim=True))
        v = codes.float() * per_channel
    else:
        v = _codes(v, recipe.values, KEYS if recipe.blocks else None)
    return online(q, k, v, scale, recipe.values, most).transpose(1, 2).to(dtype)


def online(q: Tensor, k: Tensor, v: Tensor, scale: float, weights_dtype: torch.dtype, most: float) -> Tensor:
    """Attention of float32 q [B, H, L, Dh] to k and v [B, H, S, Dh] by the online softmax over blocks of keys.

    The weights of a block, relative to the maximum so far, are multiplied by `most` and rounded to `weights_dtype`.
    """
    highest = torch.full_like(q[..., :1], float("-inf"))
    total, sums = torch.zeros_like(highest), torch.zeros_like(q)
    for start in range(0, k.shape[2], KEYS):
        scores = q @ k[:, :, start : start + KEYS].transpose(2, 3) * scale
        before, highest = highest, torch.maximum(highest, scores.amax(dim=3, keepdim=True))
        weights = (scores - highest).exp_()
        correction = (before - highest).exp_()
        total = total * correction + weights.sum(dim=3, keepdim=True)
        weights = weights * most
        weights = (weights if weights_dtype.is_floating_point else weights.round_()).to(weights_dtype).float()
        sums = sums * correction + weights @ v[:, :, start : start + KEYS]
    return sums / (total * most)


def _backend(name: str, recipe: Recipe) -> Backend:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _attend(recipe, q, k, v, scale)

    return Backend(maskless(name)(attend), exact=False)


_FP8 = torch.float8_e4m3fn
FLASH_MOST = 256.0
"""The largest power of two below 448: FlashAttention-3 adds its exponent to the scores."""
INT8_FP8 = _backend("sage_ref_int8_fp8", Recipe(torch.int8, _FP8))
INT8_FP8_UNSMOOTHED = _backend("sage_ref_int8_fp8_unsmoothed", Recipe(torch.int8, _FP8, smooth=False))
INT8_FP16 = _backend("sage_ref_int8_fp16", Recipe(torch.int8, torch.float16))
FP8_HEAD = _backend("fp8_ref", Recipe(_FP8, _FP8, blocks=False, most=FLASH_MOST))
FP8_HEAD_UNSMOOTHED = _backend("fp8_ref_unsmoothed", Recipe(_FP8, _FP8, blocks=False, smooth=False, most=FLASH_MOST))
FP8_BLOCK = _backend("fp8_block_ref", Recipe(_FP8, _FP8, most=FLASH_MOST))
FP8_BLOCK_UNSMOOTHED = _backend("fp8_block_ref_unsmoothed", Recipe(_FP8, _FP8, smooth=False, most=FLASH_MOST))
