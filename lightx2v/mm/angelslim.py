"""fp8 under one scale as AngelSlim computes it where there is no fp8 product: its results for bfloat16, bit by bit.

It turns codes into the dtype of the activations, times their scales in that dtype, and multiplies those numbers. For
bfloat16 that rounds every factor; other dtypes are float32 here, for what AngelSlim makes of them is lost in overflows.
`auto` never takes this library, it is for the same result as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm.base import Caps, Packed
from lightx2v.mm.reference import WHOLE, Held
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_TENSOR


class AngelSlim(Held):
    """`fp8_gemm` without native support and `fp8_weight_only_gemm` of angelslim 0.5."""

    name = "angelslim"
    caps = Caps(WHOLE | {(FP8_TENSOR, None)}, rtol=2.0**-7)

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        return "weights dequantized at each call, rounded as AngelSlim does"

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
        # A scale without dimensions does not promote: codes times it are rounded to the dtype of the codes.
        weight = packed.weight.to(dtype) * _scalar(packed.scale).to(dtype)
        values = x.codes.to(dtype)
        if scheme.activation is not None:
            values = values * _scalar(x.scale)
        return F.linear(values, weight, None if bias is None else bias.to(dtype)).to(out_dtype)


def _scalar(scale: Tensor) -> Tensor:
    """One scale without dimensions; scales [N, 1] of channels as they are."""
    return scale.reshape(()) if scale.numel() == 1 else scale


LIBRARY = AngelSlim()
