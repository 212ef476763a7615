"""Quantized linears by this engine's own kernels in Triton (`lightx2v.kernels`), for NVIDIA GPUs.

int8 from compute capability 8.0 on, fp8 from 8.9. Codes and scales are those of the reference, bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm.adapter import trial
from lightx2v.mm.base import Caps, Leaves, Packed, TorchQuantize, capability_words, lacks
from lightx2v.mm.quantizers import quantizer_missing, vendor_quantize
from lightx2v.mm.reference import SCHEMES
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo, install_hint, probe
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_BLOCK128


class TritonLibrary(TorchQuantize):
    """Products of `kernels.gemm`, behind the quantization of `kernels.quantize` or of whom the scheme names."""

    name = "triton"
    caps = Caps(
        SCHEMES,
        capability={"int8": ((8, 0), None), "fp8": ((8, 9), None)},
        k_multiple=16,
        bias="fused_fp32",
        exact=frozenset({"int8"}),
        # As torch's and CUTLASS' row-wise products: Hopper's tensor cores keep fewer bits of a sum of fp8 codes.
        rtol=2.0**-7,
    )

    def available(self, device: DeviceInfo) -> str | None:
        found = probe("triton")
        reasons = [] if found.version else [f"triton is {found.reason} ({install_hint('triton')})"]
        if device.capability is None or device.capability < (8, 0):
            reasons.append(f"needs compute capability 8.0 or higher, {device.name} {capability_words(device)}")
        return "; ".join(reasons) or None

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        scheme = scheme.with_library(self.name)
        reason = lacks(self.caps, scheme, n, k, device) or quantizer_missing(scheme)
        return reason or trial(self, scheme, device.torch_name)

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        version = probe("triton").version
        return f"own kernel of Triton {version}, not confirmed on a GPU yet, activations as {scheme.act_library} does"

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> int:
        return 1

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        weight = leaves["weight"]
        n, k = weight.shape
        if scheme.weight == FP8_BLOCK128:  # whole blocks along K, as the activations have whole groups
            weight = F.pad(weight.view(torch.uint8), (0, -k % 128)).view(weight.dtype)
        return Packed(self.name, n, k, weight=weight.contiguous(), scale=leaves["weight_scale"].contiguous())

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        return {"weight": packed.weight[:, : packed.k].contiguous(), "weight_scale": packed.scale}

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        quantized = vendor_quantize(scheme, x)
        return super().quantize(scheme, x, packed) if quantized is None else quantized

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        from lightx2v.kernels import ops

        multiply = ops.multiply_blocks if scheme.weight == FP8_BLOCK128 else ops.multiply_rows
        return multiply(x.codes, packed.weight, x.scale, packed.scale, bias, out_dtype)


LIBRARY = TritonLibrary()
