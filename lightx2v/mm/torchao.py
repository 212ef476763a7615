"""torchao's products of int8 and fp8 codes: https://github.com/pytorch/ao.

The product functions that LightX2V called are gone from torchao 0.19; the ones under them, used here, are in all of
0.8 to 0.19. int8 also runs on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm.adapter import VendorLibrary
from lightx2v.mm.base import Caps, Leaves, Packed, rescale
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_CHANNEL, FP8_TOKEN, INT8_CHANNEL, INT8_TOKEN
from lightx2v.vendor import Function

_INT8 = Function(
    (
        "torchao.kernel.intmm:int_scaled_matmul",
        "torchao.quantization.quantize_.workflows.int8.kernels:_int_scaled_matmul",
    ),
    ("a", "b", "scales1"),
)
_FP8 = Function(
    ("torchao.float8.inference:addmm_float8_unwrapped_inference",),
    ("a_data", "a_scale", "b_data", "b_scale", "output_dtype"),
    ("use_fast_accum",),
)
_MIN_ROWS = 17
"""GPUs multiply int8 of this many rows or more; below, torchao multiplies in float32, which is not exact."""


class TorchAO(VendorLibrary):
    """`int_scaled_matmul`, and `torch._scaled_mm` as torchao calls it."""

    name = "torchao"
    products: ClassVar[Mapping[str, Function]] = {"int8": _INT8, "fp8": _FP8}
    caps = Caps(
        frozenset({(INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN)}),
        capability={"fp8": ((8, 9), None)},
        k_multiple=16,
        n_multiple=16,
        layout="KN",
        bias="after",
        exact=frozenset({"int8"}),
        rtol=2.0**-7,
    )

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        packed = super().prepare(scheme, leaves)
        if packed.weight.dtype == torch.int8:
            # torchao copies a weight that is not contiguous as [K, N], at each call.
            packed.weight = packed.weight.t().contiguous()
        return packed

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        weight = packed.weight.t().contiguous() if packed.weight.dtype == torch.int8 else packed.weight
        return {"weight": weight, "weight_scale": packed.scale}

    def multiply(
        self, product: Callable[..., Any], x: Quantized, packed: Packed, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        if packed.weight.dtype != torch.int8:
            result: Tensor = product(
                x.codes, x.scale, packed.weight.t(), packed.scale.view(1, -1), torch.bfloat16, use_fast_accum=True
            )
            return result
        rows = x.codes.shape[0]
        extra = max(_MIN_ROWS - rows, 0) if x.codes.device.type != "cpu" else 0
        codes = F.pad(x.codes, (0, 0, 0, extra))
        # Scales of one leave the exact integers; the order in which they are scaled is then the reference's.
        product_of_codes: Tensor = product(codes, packed.weight, x.scale.new_ones(codes.shape[0], 1))
        return rescale(product_of_codes[:rows], packed, x, None, torch.float32)


LIBRARY = TorchAO()
