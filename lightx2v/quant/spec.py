"""What a quantized tensor is: its code type and how its scales are laid out. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DType = str
"""int8, fp8 (e4m3fn), int4, int3, int2, nf4, nf4_double, fp4, fp4_double, nvfp4, mxfp8 (e4m3), mxfp6 (e3m2),
mxfp4 (e2m1), or gguf_<kind>."""
Granularity = Literal["tensor", "step", "channel", "token", "group", "block"]


BITS = {"int8": 8.0, "fp8": 8.0, "mxfp8": 8.0, "mxfp6": 6.0, "mxfp4": 4.0, "nvfp4": 4.0}
BITS |= {"int4": 4.0, "int3": 3.0, "int2": 2.0, "nf4": 4.0, "nf4_double": 4.0, "fp4": 4.0, "fp4_double": 4.0}
CODEBOOKS = ("nf4", "nf4_double", "fp4", "fp4_double")
"""Four bits that number the values of a table; `_double`: the scales are quantized as well."""
_PER_PACK = {"int4": 2, "int3": 8, "int2": 4, "nf4": 2, "nf4_double": 2, "fp4": 2, "fp4_double": 2}
"""Codes that whole bytes hold."""


@dataclass(frozen=True, slots=True)
class QSpec:
    """Code type and granularity of a weight [N, K] or an activation [M, K].

    Scales: tensor [1]; channel [N, 1]; token [M, 1]; group [M, ceil(K/size)]; block [ceil(N/size), ceil(K/size)].
    "step" is an activation's: one scale for all tokens, which changes from step to step of a request, [T].
    """

    dtype: DType
    granularity: Granularity
    size: int = 0
    symmetric: bool = True
    dynamic: bool = False
    outliers: float = 0.0
    """Columns of an activation with a value beyond this stay as they are; 0: none do."""

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a [rows, columns] tensor; edges that do not fill a group or block have one as well."""
        if self.granularity == "tensor":
            return (1,)
        if self.granularity in ("channel", "token"):
            return (rows, 1)
        groups = -(-columns // self.size)
        return (rows, groups) if self.granularity == "group" else (-(-rows // self.size), groups)

    def filled(self, columns: int) -> int:
        """`columns`, filled up to whole groups and whole bytes of packed codes."""
        unit = max(self.size if self.granularity == "group" else 1, _PER_PACK.get(self.dtype, 1))
        return columns + -columns % unit

    @property
    def is_integer(self) -> bool:
        """Whether a weight has the integer codes of `quant.integers`: of few bits, in groups, or with a zero point."""
        if self.dtype == "int8":
            return self.granularity == "group" or (self.granularity == "channel" and not self.symmetric)
        return self.dtype in ("int4", "int3", "int2")

    @property
    def generic(self) -> QSpec:
        """The spec that stands for this one among the schemes of a library: integer groups of any size are alike."""
        return replace(self, size=128) if self.dtype.startswith("int") and self.granularity == "group" else self

    @property
    def is_calibrated(self) -> bool:
        """Whether an activation's scales can only come from a calibration: they are in the checkpoint."""
        return self.dtype == "int8" and self.granularity in ("tensor", "step")

    @property
    def bits(self) -> float | None:
        """Bits of one code without its scale; None for gguf, whose blocks hold both."""
        return BITS.get(self.dtype)


INT8_CHANNEL = QSpec("int8", "channel")
INT8_TOKEN = QSpec("int8", "token", dynamic=True)
FP8_CHANNEL = QSpec("fp8", "channel")
FP8_TOKEN = QSpec("fp8", "token", dynamic=True)
FP8_BLOCK128 = QSpec("fp8", "block", 128)
FP8_GROUP128 = QSpec("fp8", "group", 128, dynamic=True)
FP8_TENSOR = QSpec("fp8", "tensor")
"""As an activation: with the checkpoint's `input_scale`, or a new scale at each call where it has none."""
FP8_TENSOR_DYNAMIC = QSpec("fp8", "tensor", dynamic=True)
INT8_STATIC = QSpec("int8", "tensor")
INT8_STATIC_ASYM = QSpec("int8", "tensor", symmetric=False)
"""With the checkpoint's `input_scale` and `input_zero`."""
INT8_STEPS = QSpec("int8", "step", symmetric=False)
"""A scale per token up to a step, and the checkpoint's own for groups of the steps from there on."""
INT8_OUTLIERS = QSpec("int8", "token", dynamic=True, outliers=6.0)
"""LLM.int8 (arXiv 2208.07339): columns beyond 6 are multiplied in floating point."""
INT4_G128 = QSpec("int4", "group", 128)
INT4_G64 = QSpec("int4", "group", 64)
INT4_G64_DYNAMIC = QSpec("int4", "group", 64, dynamic=True)
NF4, NF4_DOUBLE, FP4, FP4_DOUBLE = (QSpec(dtype, "group", 64) for dtype in CODEBOOKS)
MXFP8, MXFP6, MXFP4 = (QSpec(dtype, "group", 32) for dtype in ("mxfp8", "mxfp6", "mxfp4"))
MXFP8_DYNAMIC, MXFP4_DYNAMIC = (QSpec(dtype, "group", 32, dynamic=True) for dtype in ("mxfp8", "mxfp4"))
NVFP4 = QSpec("nvfp4", "group", 16)
NVFP4_DYNAMIC = QSpec("nvfp4", "group", 16, dynamic=True)
"""As an activation: scales of groups at each call, under the checkpoint's global scale or a new one."""


@dataclass(frozen=True, slots=True)
class GgufKind:
    """One kind of blocks of a .gguf file: its number there, and the values and bytes of a block."""

    number: int
    values: int
    nbytes: int


GGUF_KINDS: dict[str, GgufKind] = {
    "F32": GgufKind(0, 1, 4),
    "F16": GgufKind(1, 1, 2),
    "BF16": GgufKind(30, 1, 2),
    "Q4_0": GgufKind(2, 32, 18),
    "Q4_1": GgufKind(3, 32, 20),
    "Q5_0": GgufKind(6, 32, 22),
    "Q5_1": GgufKind(7, 32, 24),
    "Q8_0": GgufKind(8, 32, 34),
    "Q2_K": GgufKind(10, 256, 84),
    "Q3_K": GgufKind(11, 256, 110),
    "Q4_K": GgufKind(12, 256, 144),
    "Q5_K": GgufKind(13, 256, 176),
    "Q6_K": GgufKind(14, 256, 210),
}
"""The kinds that are read here, as ggml numbers and sizes them (ggml.h, ggml-common.h)."""

GGUF: dict[str, QSpec] = {
    kind: QSpec(f"gguf_{kind.lower()}", "group", layout.values) for kind, layout in GGUF_KINDS.items()
}
"""Weights of a .gguf file. Each of its tensors may be of another kind: the one named is what floats become."""


def gguf_kind(spec: QSpec) -> str | None:
    """The kind of blocks that a spec of `GGUF` names; None for any other spec."""
    return spec.dtype.removeprefix("gguf_").upper() if spec.dtype.startswith("gguf_") else None
