"""LLM.int8 (arXiv 2208.07339): columns of the input with outliers in floating point, all others in int8.

A column is one whose largest absolute value in any token passes the threshold. Its part of the product is computed with
the weight's values in the dtype of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.elementwise import gelu_tanh
from lightx2v.mm.base import Caps, Leaves, Packed, add_bias, lacks, rescale
from lightx2v.mm.reference import int_product
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.torch_int8 import IntMM
from lightx2v.platform import DeviceInfo
from lightx2v.quant.numerics import Quantized, quantize_activation
from lightx2v.quant.spec import INT8_CHANNEL, INT8_OUTLIERS, INT8_TOKEN


class Outliers:
    """int8 by torch._int_mm, where torch has it, with outlying columns beside it."""

    name = "outliers"
    caps = Caps(frozenset({(INT8_CHANNEL, INT8_OUTLIERS)}), rtol=2.0**-7)

    def __init__(self) -> None:
        self._product = IntMM()

    def available(self, device: DeviceInfo) -> str | None:
        return None

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        return lacks(self.caps, scheme, n, k, device)

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        return "int8 product, and columns with outliers in floating point"

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> float:
        return 1

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        return self._product.pack(leaves)

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        return self._product.unpack(packed)

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        """Codes of the columns without outliers, rounded to float16 first as bitsandbytes does; the others' are 0."""
        inside = x.masked_fill(self._outlying(scheme, x), 0)
        return quantize_activation(inside.to(torch.float16), INT8_TOKEN)

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """The int8 part alone."""
        if self._product.supports(packed.weight.device) is None:
            return self._product.gemm(x, packed, bias, out_dtype)
        return rescale(int_product(x.codes, packed.weight[: packed.n, : packed.k]), packed, x, bias, out_dtype)

    def linear(self, scheme: Scheme, x: Tensor, packed: Packed, bias: Tensor | None, gelu: bool = False) -> Tensor:
        outlying = self._outlying(scheme, x)
        inside = self.gemm(scheme, self.quantize(scheme, x, packed), packed, None, torch.float32)
        if torch.compiler.is_compiling():  # how many columns there are must not change shapes
            rows, weight = x * outlying, packed.weight[: packed.n, : packed.k]
        else:
            columns = outlying.nonzero().flatten()
            rows, weight = x[:, columns], packed.weight[: packed.n, columns]
        values = (weight.float() * packed.scale.view(-1, 1)).to(x.dtype)
        out = add_bias(inside + (rows @ values.t()).float(), bias, x.dtype)
        return gelu_tanh(out) if gelu else out

    def _outlying(self, scheme: Scheme, x: Tensor) -> Tensor:
        assert scheme.activation is not None
        return x.abs().amax(dim=0) >= scheme.activation.outliers


LIBRARY = Outliers()
