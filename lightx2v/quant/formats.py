"""Which tensors a quantized weight is made of in a checkpoint, and how to make them from a float weight and back.

A weight is [N, K]; the names here are the last component of a tensor's name, as in `<layer>.weight_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightx2v.quant.numerics import CODE_DTYPES, dequantize_weight, quantize_weight
from lightx2v.quant.spec import QSpec


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a quantized weight as it is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def leaves_of(spec: QSpec, n: int, k: int) -> dict[str, Leaf]:
    """The tensors that a weight [n, k] of `spec` is stored as."""
    return {
        "weight": Leaf((n, k), CODE_DTYPES[spec.dtype]),
        "weight_scale": Leaf(spec.scale_shape(n, k), torch.float32),
    }


def quantize_leaves(weight: Tensor, spec: QSpec) -> dict[str, Tensor]:
    """The tensors that store a float weight [N, K]."""
    codes, scale = quantize_weight(weight, spec)
    return {"weight": codes, "weight_scale": scale}


def dequantize_leaves(leaves: Mapping[str, Tensor], spec: QSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] that stored tensors stand for."""
    return dequantize_weight(leaves["weight"], leaves["weight_scale"], spec, dtype)
