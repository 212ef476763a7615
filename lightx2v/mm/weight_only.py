"""Weights kept packed and dequantized at each call, for schemes that the hardware has no product for: "dequantize".

It wins memory and no time. Activations are quantized as the scheme says, so results are the scheme's: codes of eight
bits and less are exact in bfloat16, and so are their products with the scales of MX and nvfp4 blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightx2v.mm.base import Caps, Leaves, Packed
from lightx2v.mm.reference import (
    BLOCKS,
    W4A4,
    WEIGHT_ONLY,
    WHOLE,
    Held,
    held_tensors,
)
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.torch_fp8 import _has_bfloat16, _to_bfloat16
from lightx2v.platform import DeviceInfo
from lightx2v.quant import blocks, codebook, gguf, integers
from lightx2v.quant.numerics import Quantized, dequantize_weight
from lightx2v.quant.spec import CODEBOOKS, QSpec, gguf_kind

SLAB_ELEMENTS = {"cpu": 1 << 19, "accelerator": 1 << 24}
"""Weights that are dequantized at a time; few on a CPU, so that what it takes meanwhile stays in its caches."""
PRODUCT_ELEMENTS = {"cpu": 1 << 23, "accelerator": 1 << 26}
"""Weights that are multiplied at a time: a copy of so many in 16 or 32 bits is what a layer takes while it runs."""


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Dequantize(Held):
    """Any scheme by a floating-point product."""

    name = "dequantize"
    # Both factors of W4A4 are rounded to bfloat16, and their product is.
    caps = Caps(WHOLE | BLOCKS | WEIGHT_ONLY, rtol=2.0**-7, rtols={W4A4: 3 * 2.0**-8})

    def __init__(self) -> None:
        self._slow: dict[str, bool] = {}
        """Device type -> whether it has no bfloat16 product."""

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        return "weights dequantized at each call: memory won, speed not"

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        packed = super().prepare(scheme, leaves)
        # Found out here, because neither this nor the tables of values can be when a compiler traces the product.
        device = packed.weight.device
        self._slow[device.type] = _has_bfloat16(device) is not None
        assert scheme.weight is not None
        for dtype in {self._product_dtype(scheme, packed.weight.device, dtype) for dtype in _DTYPES}:
            dequantize_rows(scheme.weight, packed, 0, 1, dtype)
        return packed

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        given = x.codes.dtype if scheme.activation is None else out_dtype
        spec, dtype = scheme.weight, self._product_dtype(scheme, x.codes.device, given)
        assert spec is not None
        whole = scheme.activation is not None and scheme.activation.granularity == "tensor"
        if whole:
            nan = (x.codes.view(torch.uint8) & 127) == 127
            values = _codes(x.codes, dtype).masked_fill_(nan, torch.nan)
        elif scheme.activation is None:
            values = x.codes.to(dtype)
        else:
            scale = x.scale[:, :-1] if spec.dtype == "nvfp4" else x.scale
            # Scales that are no powers of two are rounded with their products, not before.
            exact = torch.float32 if spec.dtype == "int4" else dtype
            values = blocks.scale_blocks(_codes(x.codes, exact), scale, spec.size).to(dtype)
        products = []
        for start, stop in _slabs(spec, packed, 0, packed.n, PRODUCT_ELEMENTS):
            weight = dequantize_rows(spec, packed, start, stop, dtype)
            products.append(values[:, : packed.k] @ weight[:, : values.shape[1]].t())
        product = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        if whole or (scheme.activation is None and spec.granularity in ("channel", "tensor") and not spec.is_integer):
            return _finish(product, packed.scale.view(1, -1), x.scale.view(-1, 1) if whole else None, bias, out_dtype)
        if spec.dtype == "nvfp4":
            rows = x.scale[:, -1:] if scheme.activation is not None else None
            return _finish(product, packed.get_buffer("global_scale").reciprocal(), rows, bias, out_dtype)
        return _finish(product, None, None, bias, out_dtype)

    def _product_dtype(self, scheme: Scheme, device: torch.device, x: torch.dtype) -> torch.dtype:
        """What to multiply inputs of dtype `x` in, which is that of the result too; without codes for them `x` if fast.

        Codes of inputs are exact in bfloat16, but their products come out rounded to it: float32 gets those of float32.
        """
        if scheme.activation is not None:
            return torch.float32 if self._slow[device.type] or x == torch.float32 else torch.bfloat16
        narrow = x == torch.float16 or self._slow[device.type]
        return torch.float32 if device.type == "cpu" and narrow else x


def _finish(
    product: Tensor, columns: Tensor | None, rows: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The product [M, N] times scales of its columns and rows, plus the bias, in float32; then one rounding."""
    if columns is None and bias is None:
        return product.to(out_dtype)
    step = product.shape[0]
    if product.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, SLAB_ELEMENTS["cpu"] // product.shape[1])  # memory that is new costs more than the arithmetic
    out = product if out_dtype == product.dtype else torch.empty_like(product, dtype=out_dtype)
    for start in range(0, product.shape[0], step):
        part = product[start : start + step].float()
        if columns is not None:
            part = part * columns
        if rows is not None:
            part *= rows if rows.shape[0] == 1 else rows[start : start + step]
        out[start : start + step] = part if bias is None else part + bias
    return out


def _slabs(spec: QSpec, packed: Packed, start: int, stop: int, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
    """Rows [start, stop) in slabs of about so many weights; blocks of rows are not parted."""
    unit = spec.size if spec.granularity == "block" else 1
    size = sizes["cpu" if packed.weight.device.type == "cpu" else "accelerator"]
    step = max(1, size // packed.k // unit) * unit
    return [(first, min(stop, first + step)) for first in range(start, stop, step)]


def dequantize_rows(spec: QSpec, packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) of the weight in `dtype` [rows, K], less the scales that `gemm` applies to the product."""
    slabs = _slabs(spec, packed, start, stop, SLAB_ELEMENTS)
    if len(slabs) == 1:
        return _slab(spec, packed, start, stop, dtype)
    out = torch.empty(stop - start, packed.k, dtype=dtype, device=packed.weight.device)
    for first, last in slabs:
        out[first - start : last - start] = _slab(spec, packed, first, last, dtype)
    return out


def _slab(spec: QSpec, packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    codes = packed.weight[start:stop]
    if gguf_kind(spec):
        return gguf.dequantize_blocks(codes, packed.method, dtype)
    if spec.granularity == "block":
        return dequantize_weight(codes, packed.scale[start // spec.size : -(-stop // spec.size)], spec, dtype)
    if spec.is_integer:
        zero = packed._buffers.get("zero")
        leaves = {"weight": codes, "weight_scale": packed.scale[start:stop]}
        return integers.integer_values(
            leaves if zero is None else {**leaves, "weight_zero": zero[start:stop]}, spec, dtype
        )
    if spec.dtype in CODEBOOKS:
        return codebook.codebook_values(held_tensors(packed), spec, dtype, (start, stop))
    if spec.dtype == "fp8":
        return _codes(codes, dtype)
    if spec.dtype == "int8":
        return codes.to(dtype)
    # The scales of MX and nvfp4 are exact in bfloat16, but float16 is too narrow for them.
    exact = dtype if dtype == torch.bfloat16 else torch.float32
    values = _codes(codes, exact) if spec.dtype == "mxfp8" else blocks.unpack_elements(codes, spec, exact)
    return blocks.scale_blocks(values, packed.scale[start:stop], spec.size).to(dtype)


def _codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 codes as numbers."""
    return _to_bfloat16(codes) if dtype == torch.bfloat16 else codes.to(dtype)


LIBRARY = Dequantize()
