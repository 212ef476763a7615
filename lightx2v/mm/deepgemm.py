"""DeepGEMM's product of fp8 codes with 1x128 and 128x128 scales: https://github.com/deepseek-ai/DeepGEMM.

Scales of activations [M, K/128] are column-major with columns aligned to 16 bytes, those of weights row-major. On
compute capability 10 it takes powers of two alone as scales, which these schemes' are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightx2v.mm.adapter import VendorLibrary
from lightx2v.mm.base import Caps, Packed
from lightx2v.mm.quantizers import column_major
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_BLOCK128, FP8_GROUP128
from lightx2v.vendor import Function

#: The name since July 2025, and the one before.
_PRODUCT = Function(("deep_gemm:fp8_gemm_nt", "deep_gemm:gemm_fp8_fp8_bf16_nt"))
_ALIGN = Function(
    (
        "deep_gemm:get_mn_major_tma_aligned_tensor",
        "deep_gemm.utils:get_mn_major_tma_aligned_tensor",
        "deep_gemm:get_col_major_tma_aligned_tensor",
    )
)


class DeepGemm(VendorLibrary):
    """`fp8_gemm_nt`, which writes into a bfloat16 matrix and adds no bias."""

    name = "deepgemm"
    products: ClassVar[Mapping[str, Function]] = {"fp8": _PRODUCT}
    caps = Caps(
        frozenset({(FP8_BLOCK128, FP8_GROUP128)}),
        capability={"fp8": ((9, 0), (9, 0))},
        k_multiple=128,
        n_multiple=8,
        bias="after",
        out_dtypes=frozenset({torch.bfloat16}),
        rtol=2.0**-7,
    )

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        codes, scale = super().quantize(scheme, x, packed)
        align = _ALIGN.find().value
        aligned = align(scale) if align else column_major(scale.shape[0], scale.shape[1], scale.device).copy_(scale)
        return Quantized(codes, aligned)

    def multiply(
        self, product: Callable[..., Any], x: Quantized, packed: Packed, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        result = torch.empty(x.codes.shape[0], packed.n, dtype=out, device=x.codes.device)
        product((x.codes, x.scale), (packed.weight, packed.scale), result)
        return result


LIBRARY = DeepGemm()
