"""Floating-point numbers of four and six bits, as in the OCP Microscaling Formats specification v1.0 (section 5.3).

They have no infinities and no NaN. Rounding is to nearest, ties to even; larger numbers become the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_F32_MANTISSA, _F32_BIAS = 23, 127


@dataclass(frozen=True, slots=True)
class Minifloat:
    """Sign, exponent and mantissa, from the highest bit down; exponent 0 is for subnormal numbers."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return 2 << (self.exponent_bits + self.mantissa_bits)

    @property
    def largest(self) -> float:
        return self.values()[self.codes // 2 - 1]

    def values(self) -> list[float]:
        """The number of each code."""
        positive = []
        for code in range(self.codes // 2):
            exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
            significand = mantissa + ((1 << self.mantissa_bits) if exponent else 0)
            positive.append(significand * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits))
        return positive + [-value for value in positive]

    def round(self, x: Tensor) -> Tensor:
        """float32 numbers rounded to the format's. NaN stays."""
        magnitude = x.abs()
        exponent = (magnitude.view(torch.int32) >> _F32_MANTISSA).clamp_(min=_F32_BIAS + 1 - self.bias, max=254 - 32)
        # A float32 of this size has ulps as wide as the format's, so that adding it rounds.
        magic = ((exponent + (_F32_MANTISSA - self.mantissa_bits)) << _F32_MANTISSA).view(torch.float32)
        return magnitude.add_(magic).sub_(magic).clamp_(max=self.largest).copysign_(x)

    def encode(self, values: Tensor) -> Tensor:
        """uint8 codes of numbers of the format (float32)."""
        magnitude = values.abs()
        shifted = magnitude.view(torch.int32) >> (_F32_MANTISSA - self.mantissa_bits)
        normal = shifted - ((_F32_BIAS - self.bias) << self.mantissa_bits)
        subnormal = (magnitude * 2.0 ** (self.bias - 1 + self.mantissa_bits)).to(torch.int32)
        code = torch.where(magnitude < 2.0 ** (1 - self.bias), subnormal, normal)
        return (code | (values.signbit().to(torch.int32) * (self.codes // 2))).to(torch.uint8)


_tables: dict[str, Tensor] = {}


def _pair_table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of two codes, the first the lower one, in one element of twice the size."""
    key = f"{values} {dtype} {device}"
    if key not in _tables:
        one = torch.tensor(values, dtype=torch.float32, device=device).to(dtype)
        both = torch.stack((one.repeat(len(values)), one.repeat_interleave(len(values))), dim=1).contiguous()
        _tables[key] = both.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).view(-1)
    return _tables[key]


def lookup_pairs(pairs: Tensor, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Integers [N, K/2] of two codes each, the first in the low bits -> the [N, K] values, in float32 or half that."""
    return torch.take(_pair_table(values, dtype, pairs.device), pairs.long()).view(dtype)


E2M1 = Minifloat(2, 1)
E3M2 = Minifloat(3, 2)
