"""What the adapters of vendors' kernel libraries have in common; each of them is a table and one product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightx2v.mm.base import Caps, Leaves, Library, Packed, TorchQuantize, add_bias, capability_words, lacks, span_words
from lightx2v.mm.quantizers import quantizer_missing, vendor_quantize
from lightx2v.mm.reference import LIBRARY as REFERENCE
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo, install_hint, probe
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import FP8_CHANNEL, FP8_TOKEN, INT8_CHANNEL, INT8_TOKEN
from lightx2v.vendor import Function

_TOLERANCE = 0.01
"""Largest error of the trial, in parts of the largest result: bfloat16 rounds to 0.004, a wrong layout is off by 1."""


class VendorLibrary(TorchQuantize, ABC):
    """A library in an optional package. Activations are quantized by whom the scheme names, else in torch."""

    name: str
    caps: Caps
    products: ClassVar[Mapping[str, Function]]
    """The function that multiplies, by code dtype."""

    @abstractmethod
    def multiply(
        self, product: Callable[..., Any], x: Quantized, packed: Packed, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        """Call the library: [M, N] in `out`, one of caps.out_dtypes. `bias` is None when it is added afterwards."""

    @property
    def module(self) -> str:
        """The top-level module of its package."""
        return next(iter(self.products.values())).module

    def hardware(self, device: DeviceInfo) -> str | None:
        """The device that it needs, when `device` can run none of its products."""
        have, wanted = device.capability or (0, 0), dict[str, list[str]]()
        for dtype in self.products:
            lowest, highest = self.caps.capability.get(dtype, ((0, 0), None))
            if lowest <= have <= (highest or have):
                return None
            wanted.setdefault(span_words(lowest, highest), []).append(dtype)
        words = ", ".join(f"{span} ({' and '.join(dtypes)})" for span, dtypes in wanted.items())
        return f"compute capability {words}"

    def available(self, device: DeviceInfo) -> str | None:
        found = probe(self.module)
        reasons = [] if found.version else [f"{self.module} is {found.reason} ({install_hint(self.module)})"]
        if needs := self.hardware(device):
            reasons.append(f"needs {needs}, {device.name} {capability_words(device)}")
        if reasons:
            return "; ".join(reasons)
        # Another product may be there when one is not: can_serve asks for the scheme's own.
        problems = [product.find().reason for product in self.products.values()]
        return problems[0] if all(problems) else None

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        scheme = scheme.with_library(self.name)
        reason = lacks(self.caps, scheme, n, k, device) or self._product(scheme).find().reason
        return reason or quantizer_missing(scheme) or trial(self, scheme, device.torch_name)

    def _product(self, scheme: Scheme) -> Function:
        assert scheme.weight is not None
        return self.products[scheme.weight.dtype]

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        name = self._product(scheme).find().name
        return f"{name} of {self.module} {probe(self.module).version}, activations as {scheme.act_library} does"

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> int:
        return 1

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        weight = leaves["weight"].contiguous()
        return Packed(self.name, *weight.shape, weight=weight, scale=leaves["weight_scale"].contiguous())

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        return {"weight": packed.weight, "weight_scale": packed.scale}

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        quantized = vendor_quantize(scheme, x)
        return super().quantize(scheme, x, packed) if quantized is None else quantized

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        out = out_dtype if out_dtype in self.caps.out_dtypes else torch.bfloat16
        taken = None
        if bias is not None and self.caps.bias == "fused_fp32":
            taken = bias
        elif bias is not None and self.caps.bias == "fused" and out is out_dtype:
            taken = bias.to(out)
        product = self.multiply(self._product(scheme).find().value, x, packed, taken, out)
        return add_bias(product, bias if taken is None else None, out_dtype)


class CutlassLibrary(VendorLibrary):
    """CUTLASS' products as vLLM and SGLang both wrap them: A [M, K] row-major, B [K, N] column-major, scales [M, 1]
    and [N, 1], the bias in the dtype of the result.
    """

    def multiply(
        self, product: Callable[..., Any], x: Quantized, packed: Packed, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        result: Tensor = product(x.codes, packed.weight.t(), x.scale, packed.scale, out, bias=bias)
        return result


def cutlass_caps(int8_from: tuple[int, int]) -> Caps:
    """What both have: int8 from `int8_from` to compute capability 9.0, where its kernels end, and fp8 from 8.9 on."""
    return Caps(
        frozenset({(INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN)}),
        capability={"int8": (int8_from, (9, 0)), "fp8": ((8, 9), None)},
        k_multiple=16,
        n_multiple=16,
        layout="KN",
        bias="fused",
        out_dtypes=frozenset({torch.float16, torch.bfloat16}),
        exact=frozenset({"int8"}),
        rtol=2.0**-7,
    )


@lru_cache(maxsize=64)
@torch.no_grad()
def trial(library: Library, scheme: Scheme, device: str) -> str | None:
    """Quantize and multiply once on `device`, against the reference: versions differ in more than their signatures."""
    assert scheme.weight is not None
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (326, 384), generator=generator) * 2.0 - 1
    values = (signs * torch.rand(326, 384, generator=generator) ** 0.125).to(device)
    tokens, bias = values[256:].bfloat16(), values[:256, 0].contiguous()
    leaves = quantize_leaves(values[:256], scheme.weight)
    try:
        packed, exact = library.prepare(scheme, leaves), REFERENCE.prepare(scheme, leaves)
        x = library.quantize(scheme, tokens, packed)
        got = library.gemm(scheme, x, packed, bias, torch.bfloat16).float()
        wanted = REFERENCE.gemm(scheme, x, exact, bias, torch.float32)
        emulated = REFERENCE.gemm(scheme, REFERENCE.quantize(scheme, tokens, exact), exact, bias, torch.float32)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return f"{library.name} failed on this device: {type(error).__name__}: {said}"
    for what, off in (("product", got - wanted), ("quantization of activations", wanted - emulated)):
        size = (off.abs().max() / emulated.abs().max()).item()
        if not size <= _TOLERANCE:
            return f"its {what} gives wrong results on this device (off by {size:.2g} of the largest)"
    return None
