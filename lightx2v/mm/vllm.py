"""vLLM's CUTLASS products of int8 and fp8 codes: https://github.com/vllm-project/vllm, vllm/_custom_ops.py.

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

_SCALED_MM = Function(("vllm._custom_ops:cutlass_scaled_mm",), ("a", "b", "scale_a", "scale_b", "out_dtype"), ("bias",))


class Vllm(VendorLibrary):
    """`cutlass_scaled_mm`. Its int8 kernels end with compute capability 9.0."""

    name = "vllm"
    products: ClassVar[Mapping[str, Function]] = {"int8": _SCALED_MM, "fp8": _SCALED_MM}
    caps = Caps(
        frozenset({(INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN)}),
        capability={"int8": ((7, 5), (9, 0)), "fp8": ((8, 9), None)},
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


LIBRARY = Vllm()
