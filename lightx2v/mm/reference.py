"""Every 8-bit scheme in plain torch, on any device: what the other libraries are tested against. Slow by design.

int8 codes are accumulated exactly; fp8 codes are multiplied as float32 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.mm.base import Caps, Leaves, Packed, TorchQuantize, add_bias, lacks, rescale
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo
from lightx2v.quant.numerics import Quantized, dequantize_weight
from lightx2v.quant.spec import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
)

SCHEMES = frozenset({(INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN), (FP8_BLOCK128, FP8_GROUP128)})


class Reference(TorchQuantize):
    """The scheme's definition as code. Keeps codes and scales as the checkpoint has them."""

    name = "reference"
    caps = Caps(SCHEMES, exact=frozenset({"int8"}), rtol=1e-5)

    def available(self, device: DeviceInfo) -> str | None:
        return None

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        return lacks(self.caps, scheme, n, k, device)

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        return "plain torch, slow"

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> int:
        return 1

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        weight = leaves["weight"]
        return Packed("reference", *weight.shape, weight=weight, scale=leaves["weight_scale"])

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        return {"weight": packed.weight, "weight_scale": packed.scale}

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        assert scheme.weight is not None
        if scheme.weight.dtype == "int8":
            return rescale(int_product(x.codes, packed.weight), packed, x, bias, out_dtype)
        if scheme.weight.granularity == "channel":
            return rescale(x.codes.float() @ packed.weight.float().t(), packed, x, bias, out_dtype)
        weight = dequantize_weight(packed.weight, packed.scale, scheme.weight)
        values = dequantize_groups(x, scheme.weight.size, torch.float32)
        return add_bias(values[:, : packed.k] @ weight.t(), bias, out_dtype)


def int_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of int8 a [M, K] and b [N, K] as integers [M, N].

    float32 adds integers exactly up to 2**24 = 1024 * 128 * 128, so slices of 1024 products are summed as integers.
    """
    k = a.shape[1]
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32 if k < 2**17 else torch.int64, device=a.device)
    for start in range(0, k, 1024):
        part = slice(start, start + 1024)
        total += (a[:, part].float() @ b[:, part].float().t()).to(total.dtype)
    return total


def dequantize_groups(x: Quantized, size: int, dtype: torch.dtype) -> Tensor:
    """Activations [M, K] from codes [M, K] and the scales [M, K/size] of groups along K."""
    groups = x.codes.float().unflatten(1, (-1, size)) * x.scale.unsqueeze(2)
    return groups.flatten(1).to(dtype)


LIBRARY = Reference()
