"""SGLang's CUTLASS products of int8 and fp8 codes: https://github.com/sgl-project/sglang, sgl-kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightx2v.mm.adapter import CutlassLibrary, cutlass_caps
from lightx2v.vendor import Function

_POSITIONAL = ("mat_a", "mat_b", "scales_a", "scales_b", "out_dtype")


class Sgl(CutlassLibrary):
    """`int8_scaled_mm` and `fp8_scaled_mm`."""

    name = "sgl"
    products: ClassVar[Mapping[str, Function]] = {
        "int8": Function(("sgl_kernel:int8_scaled_mm",), _POSITIONAL, ("bias",)),
        "fp8": Function(("sgl_kernel:fp8_scaled_mm",), _POSITIONAL, ("bias",)),
    }
    caps = cutlass_caps(int8_from=(8, 0))  # it runs on 7.5 as well, but rounds to float16 alone there


LIBRARY = Sgl()
