"""Attention on quantized Q, K and V as msModelSlim's `fa3` and `fa3_quant` have it, in plain torch on any device.

`fa3_int8_ref`: Q, K and V in int8 with one scale per head, found at each call; P in int8 as well, times 127
(INT-FlashAttention, arXiv 2409.16997). `fa3_int8_static_ref`: the same with scales of the checkpoint, which also say
whether K is smoothed and Q and K are rotated (`attention.scales`). `fa3_fp8_ref`: Q and K in e4m3 with a scale per
token, V per head, P times 256. `fa3_mxfp4_ref`: Q and K in mxfp4 along the width of a head, V along the tokens, P in
e4m3 as before.

K is smoothed: its mean over the tokens is taken away (SageAttention, arXiv 2410.02367). `_unsmoothed`: it is not.
`_rotated`: Q and K are rotated over the width of a head by a randomized Hadamard matrix (QuaRot, arXiv 2404.00456;
msModelSlim's `online_quarot`). Neither changes exact attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lightx2v.attention.base import Backend
from lightx2v.attention.kernel import maskless
from lightx2v.attention.quantized import FLASH_MOST, online, rounded, smooth
from lightx2v.attention.scales import no_scales, static_attention
from lightx2v.quant.activations import quantize_input
from lightx2v.quant.blocks import scale_blocks
from lightx2v.quant.calibration.rotation import random_signs
from lightx2v.quant.hadamard import rotate, rotation_size
from lightx2v.quant.numerics import INT8_MAX
from lightx2v.quant.spec import MXFP4_DYNAMIC

Quantize = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""q [B, H, L, Dh], k and v [B, H, S, Dh], float32, to what their codes and scales stand for."""

_E4M3 = torch.float8_e4m3fn


def prepared(q: Tensor, k: Tensor, rotation: int, smoothed: bool) -> tuple[Tensor, Tensor]:
    """q [B, L, H, Dh] and k [B, S, H, Dh] as they are quantized, float32.

    `rotation` is the size of the rotation, a power of two that divides Dh; 0: none.
    """
    q, k = q.float(), k.float()
    k = smooth(k) if smoothed else k
    if rotation:
        signs = _signs(q.shape[-1], q.device)
        q, k = rotate(q * signs, rotation), rotate(k * signs, rotation)
    return q, k


@lru_cache(maxsize=16)
def _signs(dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return random_signs(dim).to(device)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    rotation: int,
    smoothed: bool,
    quantize: Quantize,
    weights: torch.dtype,
) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh] in q's dtype."""
    dtype = q.dtype
    q, k = prepared(q, k, rotation, smoothed)
    heads = quantize(*(x.transpose(1, 2) for x in (q, k, v.float())))
    most = float(INT8_MAX) if weights == torch.int8 else FLASH_MOST
    return online(*heads, scale, weights, most).transpose(1, 2).to(dtype)


def _rounded(x: Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> Tensor:
    """`x` under one scale for all values along `dims`."""
    codes, scale = rounded(x, dtype, x.abs().amax(dim=dims, keepdim=True))
    return codes.float() * scale


def _int8(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_rounded(x, torch.int8, (2, 3)) for x in (q, k, v))
    return q, k, v


def _fp8(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _rounded(q, _E4M3, (3,)), _rounded(k, _E4M3, (3,)), _rounded(v, _E4M3, (2, 3))


def _mxfp4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def blocks(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_input(rows, MXFP4_DYNAMIC)
        return scale_blocks(codes.float(), scale, MXFP4_DYNAMIC.size)[:, : x.shape[-1]].view(x.shape)

    return blocks(q), blocks(k), blocks(v.transpose(2, 3)).transpose(2, 3)


def _backend(
    name: str, quantize: Quantize, weights: torch.dtype, rotated: bool = False, smoothed: bool = True
) -> Backend:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rotation = rotation_size(q.shape[-1]) if rotated else 0
        return _attend(q, k, v, scale, rotation, smoothed, quantize, weights)

    return Backend(maskless(name)(attend), exact=False)


def _static(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    rotation: int,
    smoothed: bool,
) -> Tensor:
    """As `fa3_int8_ref`, under the scales [H] of a calibration; what lies beyond 127 times one is cut off."""

    def quantize(*heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales = (scale[:, None, None] for scale in (q_scale, k_scale, v_scale))
        q, k, v = (
            (x / scale).round_().clamp_(-INT8_MAX, INT8_MAX) * scale for x, scale in zip(heads, scales, strict=True)
        )
        return q, k, v

    return _attend(q, k, v, scale, rotation, smoothed, quantize, torch.int8)


INT8 = _backend("fa3_int8_ref", _int8, torch.int8)
INT8_UNSMOOTHED = _backend("fa3_int8_ref_unsmoothed", _int8, torch.int8, smoothed=False)
INT8_ROTATED = _backend("fa3_int8_ref_rotated", _int8, torch.int8, rotated=True)
INT8_ROTATED_UNSMOOTHED = _backend("fa3_int8_ref_rotated_unsmoothed", _int8, torch.int8, True, False)
FP8 = _backend("fa3_fp8_ref", _fp8, _E4M3)
FP8_UNSMOOTHED = _backend("fa3_fp8_ref_unsmoothed", _fp8, _E4M3, smoothed=False)
FP8_ROTATED = _backend("fa3_fp8_ref_rotated", _fp8, _E4M3, rotated=True)
FP8_ROTATED_UNSMOOTHED = _backend("fa3_fp8_ref_rotated_unsmoothed", _fp8, _E4M3, True, False)
MXFP4 = _backend("fa3_mxfp4_ref", _mxfp4, _E4M3)
MXFP4_UNSMOOTHED = _backend("fa3_mxfp4_ref_unsmoothed", _mxfp4, _E4M3, smoothed=False)
MXFP4_ROTATED = _backend("fa3_mxfp4_ref_rotated", _mxfp4, _E4M3, rotated=True)
MXFP4_ROTATED_UNSMOOTHED = _backend("fa3_mxfp4_ref_rotated_unsmoothed", _mxfp4, _E4M3, True, False)
INT8_STATIC = Backend(no_scales, exact=False, for_module=static_attention("fa3_int8_static_ref", _static))
