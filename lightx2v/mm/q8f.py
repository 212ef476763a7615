"""Products of int8 and fp8 codes for Ada GPUs: https://github.com/KONAKONA666/q8_kernels, functional/linear.py.

Both operands [rows, K] contiguous, float32 bias, and a batch dimension of 1 in front of the result. Its tiles are
128x128x64 and only the last rows are guarded, so N and K have to fill them. It rounds to bfloat16: float16 results
are not written at all. Activations are quantized by vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightx2v.mm.adapter import VendorLibrary
from lightx2v.mm.base import Caps, Packed
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_CHANNEL, FP8_TOKEN, INT8_CHANNEL, INT8_TOKEN
from lightx2v.vendor import Function

_POSITIONAL = ("a", "b", "bias", "scale_a", "scale_b")


class Q8F(VendorLibrary):
    """`q8_linear` and `fp8_linear`. LTX-Video's package, whose module has the same name, lacks the latter."""

    name = "q8f"
    products: ClassVar[Mapping[str, Function]] = {
        "int8": Function(
            ("q8_kernels.functional.linear:q8_linear",),
            _POSITIONAL,
            ("out_dtype",),
            (("fuse_gelu", False), ("use_hadamard", False)),
        ),
        "fp8": Function(
            ("q8_kernels.functional.linear:fp8_linear",), _POSITIONAL, ("out_dtype",), (("use_hadamard", False),)
        ),
    }
    caps = Caps(
        frozenset({(INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN)}),
        # As published it is compiled for 8.9 alone; builds for later devices are told by the trial.
        capability={"int8": ((8, 9), None), "fp8": ((8, 9), None)},
        k_multiple=64,
        n_multiple=128,
        bias="fused_fp32",
        out_dtypes=frozenset({torch.bfloat16}),
        exact=frozenset({"int8"}),
        rtol=2.0**-7,
    )

    def multiply(
        self, product: Callable[..., Any], x: Quantized, packed: Packed, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        result: Tensor = product(x.codes, packed.weight, bias, x.scale, packed.scale, out_dtype=out)
        return result.view(x.codes.shape[0], packed.n)


LIBRARY = Q8F()
