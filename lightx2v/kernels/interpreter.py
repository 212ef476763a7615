"""Triton's interpreter, mended where it differs from a GPU (seen in 3.6 and 3.7, with numpy 2.4).

Its conversions from float32 truncate to bfloat16; to e4m3 they round .5 away from zero and lose the carry into an odd
exponent, so that 127.9 becomes 64. A GPU rounds to nearest, ties to even (`cvt.rn`, PTX ISA), as torch does on a CPU.
It also asks arrays of one element for an index, which numpy 2.4 refuses.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

_TORCH: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_BITS: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def interpreting() -> bool:
    """Whether kernels run in the interpreter, which is decided when triton is imported."""
    return bool(triton.knobs.runtime.interpret)


def convert(values: Any, source: tl.dtype, target: tl.dtype, rounding: object = None) -> Any:
    """The bits of a numpy array of `source` values as `target`, in the array's shape; too large becomes e4m3's 448."""
    bits = np.ascontiguousarray(values).view(_BITS[source.primitive_bitwidth])
    floats = torch.from_numpy(bits.copy()).view(_TORCH[source.name])
    if target.name == "fp8e4nv":
        floats = floats.float().clamp(-448.0, 448.0)
    made = floats.to(_TORCH[target.name])
    width = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[made.element_size()]
    return made.view(width).numpy().reshape(np.shape(values))


@lru_cache(maxsize=1)
def mend() -> None:
    """Have the interpreter convert as a GPU does. Does nothing where kernels are compiled."""
    if not interpreting():
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch
