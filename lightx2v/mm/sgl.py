"""SGLang's CUTLASS products of int8 and fp8 codes: https://github.com/sgl-project/sglang, sgl-kernel.

A [M, K] row-major, B [K, N] column-major; float32 scales of tokens [M, 1] and channels [N, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightx2v.mm.adapter import VendorLibrary
from lightx2v.mm.base import Caps, Packed
from lightx2v.mm.vendor import Function
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_CHANNEL, FP8_TOKEN, INT8_CHANNEL, INT8_TOKEN

_POSITIONAL = ("mat_a", "mat_b", "scales_a", "scales_b", "out_dtype")


class Sgl(VendorLibrary):
    """`int8_scaled_mm`, whose kernels end with compute capability 9.0, and `fp8_scaled_mm`."""

    name = "sgl"
    products: ClassVar[Mapping[str, Function]] = {
        "int8": Function(("sgl_kernel:int8_scaled_mm",), _POSITIONAL, ("bias",)),
        "fp8": Function(("sgl_kernel:fp8_scaled_mm",), _POSITIONAL, ("bias",)),
    }
    caps = Caps(
        frozenset({(INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN)}),
        # int8 runs on 7.5 as well, but rounds to float16 alone there.
        capability={"int8": ((8, 0), (9, 0)), "fp8": ((8, 9), None)},
        k_multiple=16,
        n_multiple=16,
        layout="KN",
        bias="fused",
        out_dtypes=frozenset({torch.float16, torch.bfloat16}),
        exact=frozenset({"int8"}),
        rtol=2.0**-7,
    )

    def multiply(
        self, product: Callable[..., Any], x: Quantized, packed: Packed, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        result: Tensor = product(x.codes, packed.weight.t(), x.scale, packed.scale, out, bias=bias)
        return result


LIBRARY = Sgl()
