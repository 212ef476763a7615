"""The blocks of .gguf files, in torch on any device: the float32 numbers that ggml's own code gives, to the last bit.

A block holds the codes of 32 or 256 successive values of a row with their scales. Layouts: ggml-common.h; the
arithmetic is that of ggml-quants.c (https://github.com/ggml-org/ggml). B blocks; G groups of a block, one scale each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightx2v.quant.spec import GGUF_KINDS

KIND_OF_NUMBER = {layout.number: kind for kind, layout in GGUF_KINDS.items()}
FLOAT_KINDS: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Blocks(NamedTuple):
    """value = scale * code - offset."""

    codes: Tensor
    """[B, G, values] integers."""
    scale: Tensor
    """[B, G, 1] float32."""
    offset: Tensor | None = None


def dequantize_blocks(raw: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [N, K] of rows of blocks, uint8 [N, bytes], computed in float32 and rounded to `dtype`."""
    if kind in FLOAT_KINDS:
        return raw.contiguous().view(FLOAT_KINDS[kind]).to(dtype)
    codes, scale, offset = _UNPACK[kind](raw.reshape(-1, GGUF_KINDS[kind].nbytes))
    values = codes.to(torch.float32).mul_(scale)
    if offset is not None:
        values -= offset
    return values.view(raw.shape[0], -1).to(dtype)


def quantize_blocks(weight: Tensor, kind: str) -> Tensor:
    """Rows of blocks for a weight [N, K] of any float dtype, as ggml quantizes; K is a multiple of the block.

    Raises ValueError for the kinds that ggml fits by a search over scales (Q2_K to Q6_K).
    """
    if kind in FLOAT_KINDS:
        return weight.to(FLOAT_KINDS[kind]).contiguous().view(torch.uint8)
    if kind not in _QUANTIZE:
        raise ValueError(f"blocks of {kind} are made by llama.cpp's tools; floats become {', '.join(QUANTIZABLE)} here")
    blocks = weight.float().reshape(-1, GGUF_KINDS[kind].values)
    return _QUANTIZE[kind](blocks).view(weight.shape[0], -1)


def _half(raw: Tensor) -> Tensor:
    """[B, 2n] bytes as n float16 numbers, in float32 [B, n]."""
    return raw.contiguous().view(torch.float16).float()


def _bits(raw: Tensor, width: int, group: int) -> Tensor:
    """Bytes [B, n] -> [B, n * 8 / width] codes: the lowest bits of `group` bytes first, then their next ones."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=raw.device).view(-1, 1)
    return ((raw.unflatten(1, (-1, 1, group)) >> shifts) & ((1 << width) - 1)).flatten(1)


def _q8_0(raw: Tensor) -> _Blocks:
    return _Blocks(raw[:, 2:].view(torch.int8).unsqueeze(1), _half(raw[:, :2]).unsqueeze(2))


def _q4(raw: Tensor) -> Tensor:
    return _bits(raw, 4, 16).unsqueeze(1)


def _q5(high: Tensor, low: Tensor) -> Tensor:
    """32 codes: their low halves in 16 bytes, their fifth bits in the four before."""
    fifth = _bits(high, 1, 1).unsqueeze(1)
    return _q4(low) | (fifth << 4)


def _q4_0(raw: Tensor) -> _Blocks:
    return _Blocks(_q4(raw[:, 2:]).view(torch.int8) - 8, _half(raw[:, :2]).unsqueeze(2))


def _q4_1(raw: Tensor) -> _Blocks:
    scale, low = _half(raw[:, :4]).unsqueeze(2).split(1, dim=1)
    return _Blocks(_q4(raw[:, 4:]), scale, -low)


def _q5_0(raw: Tensor) -> _Blocks:
    return _Blocks(_q5(raw[:, 2:6], raw[:, 6:]).view(torch.int8) - 16, _half(raw[:, :2]).unsqueeze(2))


def _q5_1(raw: Tensor) -> _Blocks:
    scale, low = _half(raw[:, :4]).unsqueeze(2).split(1, dim=1)
    return _Blocks(_q5(raw[:, 4:8], raw[:, 8:]), scale, -low)


def _q2_k(raw: Tensor) -> _Blocks:
    scale, offset = _half(raw[:, 80:]).split(1, dim=1)
    codes = _bits(raw[:, 16:80], 2, 32).view(-1, 16, 16)
    return _Blocks(codes, (scale * (raw[:, :16] & 15)).unsqueeze(2), (offset * (raw[:, :16] >> 4)).unsqueeze(2))


def _q3_k(raw: Tensor) -> _Blocks:
    low, high = _bits(raw[:, 96:104], 4, 8), _bits(raw[:, 104:108], 2, 4)
    scales = (low | (high << 4)).view(torch.int8) - 32
    # A set bit of the mask means that nothing is subtracted.
    less = (_bits(raw[:, :32], 1, 32) ^ 1) << 2
    codes = _bits(raw[:, 32:96], 2, 32).view(torch.int8) - less.view(torch.int8)
    return _Blocks(codes.view(-1, 16, 16), (_half(raw[:, 108:]) * scales).unsqueeze(2))


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minima of 16 bytes, times the two float16 numbers before them: [B, 8, 1]."""
    scale, minimum = _half(raw[:, :4]).split(1, dim=1)
    first, second, rest = raw[:, 4:16].split(4, dim=1)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1)
    return (scale * scales).unsqueeze(2), (minimum * minima).unsqueeze(2)


def _q4_k(raw: Tensor) -> _Blocks:
    return _Blocks(_bits(raw[:, 16:], 4, 32).view(-1, 8, 32), *_k_scales(raw))


def _q5_k(raw: Tensor) -> _Blocks:
    codes = _bits(raw[:, 48:], 4, 32) | (_bits(raw[:, 16:48], 1, 32) << 4)
    return _Blocks(codes.view(-1, 8, 32), *_k_scales(raw))


def _q6_k(raw: Tensor) -> _Blocks:
    codes = (_bits(raw[:, :128], 4, 64) | (_bits(raw[:, 128:192], 2, 32) << 4)).view(torch.int8) - 32
    scales = _half(raw[:, 208:]) * raw[:, 192:208].contiguous().view(torch.int8)
    return _Blocks(codes.view(-1, 16, 16), scales.unsqueeze(2))


_UNPACK: dict[str, Callable[[Tensor], _Blocks]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, scale.reciprocal())


def _to_bytes(*numbers: Tensor) -> Tensor:
    return torch.cat([number.to(torch.float16) for number in numbers], dim=1).view(torch.uint8)


def _with_fifth_bits(codes: Tensor) -> Tensor:
    """[B, 32] codes below 32 as `_q5` reads them."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    high = ((codes >> 4).view(-1, 4, 8) << shifts).sum(dim=2).to(torch.uint8)
    return torch.cat((high, _halves(codes & 15)), dim=1)


def _halves(codes: Tensor) -> Tensor:
    """[B, 32] codes below 16 in 16 bytes: the first half of them in the low bits."""
    return codes[:, :16] | (codes[:, 16:] << 4)


def _symmetric(blocks: Tensor, levels: int, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """Codes of 0 to 2 * levels - 1 about `levels`, so scaled that the value of largest size, of either sign, gets 0."""
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = largest / -levels
    codes = torch.trunc(blocks * _inverse(scale) + (levels + 0.5)).clamp_(0, 2 * levels - 1).to(torch.uint8)
    return torch.cat((_to_bytes(scale), pack(codes)), dim=1)


def _affine(blocks: Tensor, levels: int, pack: Callable[[Tensor], Tensor]) -> Tensor:
    low, high = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    scale = (high - low) / levels
    codes = torch.trunc((blocks - low) * _inverse(scale) + 0.5).clamp_(0, levels).to(torch.uint8)
    return torch.cat((_to_bytes(scale, low), pack(codes)), dim=1)


def _to_q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    size = scaled.abs()
    codes = (size + 0.5).floor_().mul_(scaled.sign()).to(torch.int8)
    return torch.cat((_to_bytes(scale), codes.view(torch.uint8)), dim=1)


_QUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _to_q8_0,
    "Q4_0": lambda blocks: _symmetric(blocks, 8, _halves),
    "Q4_1": lambda blocks: _affine(blocks, 15, _halves),
    "Q5_0": lambda blocks: _symmetric(blocks, 16, _with_fifth_bits),
    "Q5_1": lambda blocks: _affine(blocks, 31, _with_fifth_bits),
}
QUANTIZABLE = (*FLOAT_KINDS, *_QUANTIZE)
"""The kinds that `quantize_blocks` makes."""
