"""vLLM's CUTLASS products of int8 and fp8 codes: https://github.com/vllm-project/vllm, vllm/_custom_ops.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightx2v.mm.adapter import CutlassLibrary, cutlass_caps
from lightx2v.vendor import Function

_SCALED_MM = Function(("vllm._custom_ops:cutlass_scaled_mm",), ("a", "b", "scale_a", "scale_b", "out_dtype"), ("bias",))


class Vllm(CutlassLibrary):
    """`cutlass_scaled_mm`."""

    name = "vllm"
    products: ClassVar[Mapping[str, Function]] = {"int8": _SCALED_MM, "fp8": _SCALED_MM}
    caps = cutlass_caps(int8_from=(7, 5))


LIBRARY = Vllm()
