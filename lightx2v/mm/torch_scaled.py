"""torch's products of block-scaled codes on tensor cores, and of fp8 codes under one scale.

MX and nvfp4 by torch.nn.functional.scaled_mm (compute capability 10.0, Blackwell), fp8-pertensor by torch._scaled_mm
(8.9). Whether one works is tried once, on a small product against the reference. No such device has confirmed them yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm.base import Caps, Leaves, Packed, add_bias, lacks, rescale
from lightx2v.mm.reference import WHOLE, QuantizeAny
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.torch_fp8 import _pad
from lightx2v.mm.torch_native import Method, _trial
from lightx2v.platform import DeviceInfo
from lightx2v.quant.blocks import pack_elements
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.packing import swizzle, unswizzle
from lightx2v.quant.spec import MXFP4, MXFP4_DYNAMIC, MXFP8, MXFP8_DYNAMIC, NVFP4, NVFP4_DYNAMIC, QSpec

_ROWS = 16
"""Multiple of output channels that torch's products want."""


class BlockProduct:
    """One block-scaled format on both sides. K is filled up to four blocks and N to 16 channels, with zeros."""

    words = "torch.nn.functional.scaled_mm"

    def __init__(self, spec: QSpec) -> None:
        self.name, self.spec, self.code_bytes = spec.dtype, spec, 1
        self.per_byte = 8 // int(spec.bits or 8)

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        if not hasattr(F, "scaled_mm"):
            return "needs a torch with scaled_mm (2.10)"
        return None if self.per_byte == 1 or hasattr(torch, "float4_e2m1fn_x2") else "needs a torch with float4"

    def pack(self, leaves: Leaves) -> Packed:
        codes, scale = leaves["weight"], leaves["weight_scale"]
        n, k = codes.shape[0], codes.shape[1] * self.per_byte
        extra = {"global_scale": leaves["weight_global_scale"]} if "weight_global_scale" in leaves else {}
        if "input_global_scale" in leaves:
            extra["input_global_scale"] = leaves["input_global_scale"]
        whole = _fill(codes, -n % _ROWS, self._missing(k))
        return Packed(self.name, n, k, weight=whole, scale=swizzle(scale), **extra)

    def unpack(self, packed: Packed) -> dict[str, Tensor]:
        codes = packed.weight[: packed.n, : packed.k // self.per_byte].contiguous()
        leaves = {
            "weight": codes,
            "weight_scale": unswizzle(packed.scale, packed.n, packed.k // self.spec.size),
        }
        if "global_scale" in packed._buffers:
            leaves["weight_global_scale"] = packed.get_buffer("global_scale")
        if "input_global_scale" in packed._buffers:
            leaves["input_global_scale"] = packed.get_buffer("input_global_scale")
        return leaves

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        functional: Any = F
        kinds, swizzles = functional.ScalingType, functional.SwizzleType
        codes = _fill(pack_elements(x.codes.float(), self.spec), 0, self._missing(packed.k))
        if self.spec.dtype == "nvfp4":
            recipe, order = [kinds.BlockWise1x16, kinds.TensorWise], [swizzles.SWIZZLE_32_4_4, swizzles.NO_SWIZZLE]
            scale_a = [swizzle(x.scale[:, :-1].to(torch.float8_e4m3fn)).flatten(), x.scale[:1, -1]]
            scale_b = [packed.scale.flatten(), packed.get_buffer("global_scale").reciprocal().reshape(1)]
        else:
            recipe, order = [kinds.BlockWise1x32], [swizzles.SWIZZLE_32_4_4]
            exponents = (x.scale.view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
            scale_a, scale_b = [swizzle(exponents).flatten()], [packed.scale.flatten()]
        product = functional.scaled_mm(
            self._typed(codes),
            self._typed(packed.weight).t(),
            scale_a,
            recipe,
            scale_b,
            recipe,
            swizzle_a=order,
            swizzle_b=order,
            output_dtype=torch.bfloat16,
        )
        return add_bias(product[:, : packed.n], bias, out_dtype)

    def _missing(self, k: int) -> int:
        """Bytes that a row of k codes lacks to four whole blocks."""
        return (-k % (4 * self.spec.size)) // self.per_byte

    def _typed(self, codes: Tensor) -> Tensor:
        return codes if self.per_byte == 1 else codes.view(torch.float4_e2m1fn_x2)


class WholeProduct:
    """fp8 codes under one scale; scales and bias are applied to the bfloat16 product of the codes."""

    name = "scaled_mm_whole"
    words = "torch._scaled_mm"
    code_bytes = 1

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        return None

    def pack(self, leaves: Leaves) -> Packed:
        n, k = leaves["weight"].shape
        extra = {"input_scale": leaves["input_scale"]} if "input_scale" in leaves else {}
        weight = _pad(leaves["weight"], -k % 16, -n % 16)
        return Packed(self.name, n, k, weight=weight, scale=leaves["weight_scale"], **extra)

    def unpack(self, packed: Packed) -> dict[str, Tensor]:
        leaves = {"weight": packed.weight[: packed.n, : packed.k].contiguous(), "weight_scale": packed.scale}
        if "input_scale" in packed._buffers:
            leaves["input_scale"] = packed.get_buffer("input_scale")
        return leaves

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        one = torch.ones((), device=x.codes.device)
        product = torch._scaled_mm(
            _pad(x.codes, -packed.k % 16, 0),
            packed.weight.t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return rescale(product[:, : packed.n], packed, x, bias, out_dtype)


def _fill(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Zero codes appended below and on the right."""
    return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(codes.dtype)


_METHODS: dict[str, Method] = {spec.dtype: BlockProduct(spec) for spec in (MXFP8, MXFP4, NVFP4)}
_METHODS["fp8"] = WholeProduct()
_BLACKWELL = ((10, 0), None)


class TorchScaled(QuantizeAny):
    """torch's scaled products."""

    name = "torch_scaled"
    caps = Caps(
        WHOLE | {(MXFP8, MXFP8_DYNAMIC), (MXFP4, MXFP4_DYNAMIC), (NVFP4, NVFP4_DYNAMIC)},
        capability={"mxfp8": _BLACKWELL, "mxfp4": _BLACKWELL, "nvfp4": _BLACKWELL, "fp8": ((8, 9), None)},
        rtol=2.0**-7,
    )

    def available(self, device: DeviceInfo) -> str | None:
        return None

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        return lacks(self.caps, scheme, n, k, device) or _problem(scheme, torch.device(device.torch_name))

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        return _method(scheme).words

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> float:
        assert scheme.weight is not None
        return (scheme.weight.bits or 8) / 8

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        return _method(scheme).pack(leaves)

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        return _method(scheme).unpack(packed)

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        return _method(scheme).gemm(x, packed, bias, out_dtype)


def _method(scheme: Scheme) -> Method:
    assert scheme.weight is not None
    return _METHODS[scheme.weight.dtype]


@lru_cache(maxsize=64)
def _problem(scheme: Scheme, device: torch.device) -> str | None:
    method = _method(scheme)
    return method.supports(device) or _trial(method, scheme, device)


LIBRARY = TorchScaled()
