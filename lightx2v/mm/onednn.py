"""Quantized linears on a CPU by oneDNN's products.

The compiled kernels of `lightx2v.native` quantize, multiply and rescale a block of rows at a time. int8 codes are
summed exactly; e4m3 codes are multiplied as the bfloat16 numbers that they are, so a weight keeps one byte. Where there
is no compiler, int8 goes through torch's quantized linear of oneDNN. `onednn_weights` has the weight-only schemes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm import onednn_weights
from lightx2v.mm.base import Caps, Leaves, Packed, TorchQuantize, lacks
from lightx2v.mm.reference import SCHEMES, held_code_bytes
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.torch_int8 import OneDnn
from lightx2v.native import ops
from lightx2v.native.build import kernels
from lightx2v.platform import DeviceInfo
from lightx2v.quant.numerics import NATIVE, Quantized, rounding_of
from lightx2v.quant.spec import FP8_BLOCK128, FP8_CHANNEL, INT8_CHANNEL, QSpec

PANEL = 64
"""Output channels that the kernels compute at a time."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one kernel wants the codes: [N/64, K/per, 64, per], K filled up with zeros to a multiple of `multiple`."""

    kind: str
    per: int
    multiple: int


_LAYOUTS: dict[QSpec | None, _Layout] = {
    INT8_CHANNEL: _Layout("int8", 4, 64),
    FP8_CHANNEL: _Layout("fp8", 2, 64),
    FP8_BLOCK128: _Layout("fp8_block", 2, 128),
}


def pack_panels(codes: Tensor, layout: _Layout) -> Tensor:
    """One-byte codes [N, K] -> uint8 [N/64, K/per, 64, per]."""
    n, k = codes.shape
    padded = F.pad(codes.view(torch.uint8), (0, -k % layout.multiple, 0, -n % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // layout.per, layout.per).transpose(1, 2).contiguous()


def unpack_panels(panels: Tensor, n: int, k: int) -> Tensor:
    """What `pack_panels` was given, as bytes."""
    rows = panels.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[:n, :k].contiguous()


class OneDnnLibrary(TorchQuantize):
    """oneDNN on CPUs, with the compiled kernels around it where there is a compiler."""

    name = "onednn"
    caps = Caps(SCHEMES | onednn_weights.SCHEMES, exact=frozenset({"int8"}), rtol=2.0**-16)

    def __init__(self) -> None:
        self._qlinear = OneDnn()

    def available(self, device: DeviceInfo) -> str | None:
        return None if device.kind == "cpu" else "computes on CPUs"

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        reason = lacks(self.caps, scheme, n, k, device)
        if reason is None and scheme.activation is None and scheme.weight is not None:
            return onednn_weights.refuses(scheme.weight)
        if reason is None and (missing := self._without_kernel(scheme)):
            reason = self._qlinear.supports(torch.device("cpu")) if scheme.weight == INT8_CHANNEL else missing
        return reason

    def _without_kernel(self, scheme: Scheme) -> str | None:
        """Why the compiled kernels cannot compute `scheme`, None when they can."""
        return kernels().lacks("int8" if scheme.weight == INT8_CHANNEL else "bfloat16")

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        if scheme.activation is None:
            return "compiled kernel around oneDNN, codes of weights multiplied in bfloat16"
        if missing := self._without_kernel(scheme):
            return f"oneDNN's quantized linear of torch ({missing})"
        words = "int8" if scheme.weight == INT8_CHANNEL else "fp8 codes multiplied in bfloat16"
        return f"compiled kernel around oneDNN, {words}"

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> float:
        return held_code_bytes(scheme)

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        if scheme.activation is None and scheme.weight is not None:
            return onednn_weights.prepare(scheme.weight, leaves)
        if self._without_kernel(scheme):
            return self._qlinear.pack(leaves)
        layout, codes, scale = _LAYOUTS[scheme.weight], leaves["weight"], leaves["weight_scale"]
        n, k = codes.shape
        packed = Packed(layout.kind, n, k, weight=pack_panels(codes, layout), scale=scale.contiguous())
        if layout.kind == "int8":
            # The kernels shift activations by 128, which adds 128 times the sum of a channel's codes.
            shift = codes.sum(dim=1, dtype=torch.int64).mul_(128).to(torch.int32)
            packed.register_buffer("shift", shift, persistent=False)
        return packed

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        if scheme.activation is None and scheme.weight is not None:
            return onednn_weights.unpack(scheme.weight, packed)
        if packed.method == self._qlinear.name:
            return self._qlinear.unpack(packed)
        codes = unpack_panels(packed.weight, packed.n, packed.k)
        dtype = torch.int8 if packed.method == "int8" else torch.float8_e4m3fn
        return {"weight": codes.view(dtype), "weight_scale": packed.scale}

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        """Codes and scales; x itself where weights alone are quantized."""
        return Quantized(x, x.new_ones(1)) if scheme.activation is None else super().quantize(scheme, x, packed)

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        if scheme.activation is None:
            return onednn_weights.linear(scheme, x.codes, packed, bias, False).to(out_dtype)
        if packed.method == self._qlinear.name:
            return self._qlinear.gemm(x, packed, bias, out_dtype)
        return _kernel(x.codes, x.scale.contiguous(), packed, bias).to(out_dtype)

    def linear(self, scheme: Scheme, x: Tensor, packed: Packed, bias: Tensor | None, gelu: bool = False) -> Tensor:
        if scheme.activation is None:
            return onednn_weights.linear(scheme, x, packed, bias, gelu)
        # The kernels round as NATIVE says; other libraries' rounding is done before.
        if packed.method == self._qlinear.name or rounding_of(scheme.act_library, scheme.activation) != NATIVE:
            return super().linear(scheme, x, packed, bias, gelu)
        if x.dtype not in ops.DTYPES:
            return _kernel(x.float(), None, packed, bias, gelu).to(x.dtype)
        return _kernel(x, None, packed, bias, gelu)


def _kernel(x: Tensor, x_scale: Tensor | None, packed: Packed, bias: Tensor | None, gelu: bool = False) -> Tensor:
    shift = packed.get_buffer("shift") if packed.method == "int8" else None
    return ops.linear(packed.method, x, x_scale, packed.n, packed.k, packed.weight, packed.scale, shift, bias, gelu)


LIBRARY = OneDnnLibrary()
