"""What a quantized tensor is: its code type and how its scales are laid out. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = str
"""int8, fp8 (e4m3fn), int4, nvfp4, mxfp8, mxfp6, mxfp4, or gguf_<kind>."""
Granularity = Literal["tensor", "channel", "token", "group", "block"]


@dataclass(frozen=True, slots=True)
class QSpec:
    """Code type and granularity of a weight [N, K] or an activation [M, K].

    Scales: tensor [1]; channel [N, 1]; token [M, 1]; group [M, ceil(K/size)]; block [ceil(N/size), ceil(K/size)].
    """

    dtype: DType
    granularity: Granularity
    size: int = 0
    symmetric: bool = True
    dynamic: bool = False

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a [rows, columns] tensor; edges that do not fill a group or block have one as well."""
        if self.granularity == "tensor":
            return (1,)
        if self.granularity in ("channel", "token"):
            return (rows, 1)
        groups = -(-columns // self.size)
        return (rows, groups) if self.granularity == "group" else (-(-rows // self.size), groups)


INT8_CHANNEL = QSpec("int8", "channel")
INT8_TOKEN = QSpec("int8", "token", dynamic=True)
FP8_CHANNEL = QSpec("fp8", "channel")
FP8_TOKEN = QSpec("fp8", "token", dynamic=True)
FP8_BLOCK128 = QSpec("fp8", "block", 128)
FP8_GROUP128 = QSpec("fp8", "group", 128, dynamic=True)
