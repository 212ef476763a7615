"""The products of codes that torch itself has, on any of its devices.

For each scheme the first of these that works here: int8 by torch._int_mm, which is exact; fp8 by
torch._scaled_mm (compute capability 8.9) or in bfloat16; fp8-b128 by scaled_mm (9.0) or in bfloat16. Whether one works
is tried once, on a small product against the reference, since torch versions differ in what they accept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lightx2v.mm.base import Caps, Leaves, Packed, TorchQuantize, lacks
from lightx2v.mm.reference import LIBRARY as REFERENCE
from lightx2v.mm.reference import SCHEMES
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.torch_fp8 import Bfloat16Blocks, Bfloat16Channels, ScaledBlocks, ScaledRows
from lightx2v.mm.torch_int8 import IntMM
from lightx2v.platform import DeviceInfo
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_BLOCK128, FP8_CHANNEL, INT8_CHANNEL, QSpec


class Method(Protocol):
    """One way to multiply codes: pack a weight, multiply, and give the codes back."""

    name: str
    words: str
    code_bytes: int
    """Bytes that a weight takes once it is packed."""

    def supports(self, device: torch.device) -> str | None: ...
    def pack(self, leaves: Leaves) -> Packed: ...
    def unpack(self, packed: Packed) -> Leaves: ...
    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor: ...


_METHODS: dict[QSpec | None, tuple[Method, ...]] = {
    INT8_CHANNEL: (IntMM(),),
    FP8_CHANNEL: (ScaledRows(), Bfloat16Channels()),
    FP8_BLOCK128: (ScaledBlocks(), Bfloat16Blocks()),
}
_BY_NAME = {method.name: method for methods in _METHODS.values() for method in methods}


class TorchNative(TorchQuantize):
    """Torch's own kernels, without any other library."""

    name = "torch_native"
    caps = Caps(SCHEMES, exact=frozenset({"int8"}), rtol=2.0**-7)

    def available(self, device: DeviceInfo) -> str | None:
        return None

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        reason = lacks(self.caps, scheme, n, k, device)
        if reason is None:
            method, reasons = _choose(scheme, torch.device(device.torch_name))
            reason = None if method else "; ".join(reasons)
        return reason

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        method, _ = _choose(scheme, torch.device(device.torch_name))
        return method.words if method else "cannot compute it"

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> int:
        method, _ = _choose(scheme, torch.device(device.torch_name))
        return method.code_bytes if method else 1

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        device = leaves["weight"].device
        method, reasons = _choose(scheme, device)
        if method is None:
            raise RuntimeError(f"torch_native cannot compute {scheme.name} on {device}: {'; '.join(reasons)}")
        return method.pack(leaves)

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        return _BY_NAME[packed.method].unpack(packed)

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        return _BY_NAME[packed.method].gemm(x, packed, bias, out_dtype)


@lru_cache(maxsize=64)
def _choose(scheme: Scheme, device: torch.device) -> tuple[Method | None, tuple[str, ...]]:
    """The first method that computes `scheme` rightly on `device`, and why each before it does not."""
    reasons: list[str] = []
    for method in _METHODS[scheme.weight]:
        reason = method.supports(device) or _trial(method, scheme, device)
        if reason is None:
            return method, tuple(reasons)
        reasons.append(f"{method.words}: {reason}")
    return None, tuple(reasons)


@torch.no_grad()
def _trial(method: Method, scheme: Scheme, device: torch.device) -> str | None:
    """Multiply extreme codes of ragged shape; CPUs without VNNI, for one, saturate sums of two int8 products."""
    assert scheme.weight is not None
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (200, 392), generator=generator) * 2.0 - 1
    values = signs * torch.rand(200, 392, generator=generator) ** 0.125
    try:
        leaves = quantize_leaves(values[:136].to(device), scheme.weight)
        packed = REFERENCE.prepare(scheme, leaves)
        x = REFERENCE.quantize(scheme, values[150:].to(device), packed)
        wanted = REFERENCE.gemm(scheme, x, packed, None, torch.float32)
        got = method.gemm(x, method.pack(leaves), None, torch.float32)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        return f"refused by this torch: {str(error).strip().splitlines()[0]}"
    error_size = ((got - wanted).abs().max() / wanted.abs().max()).item()
    limit = 1e-6 if scheme.weight.dtype in TorchNative.caps.exact else 0.01
    return None if error_size <= limit else f"gives wrong results on this device (off by {error_size:.2g})"


LIBRARY = TorchNative()
