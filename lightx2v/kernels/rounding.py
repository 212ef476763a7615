"""What kernels share when they quantize: bit for bit what `quant.numerics` does with its NATIVE rounding.

Launch with `enable_fp_fusion=False`: a multiplication fused with the addition that rounds would round once, not twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest(values: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The largest absolute value along `axis`, float32. As integers NaN is above inf, and so is not lost."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def nearest(values: tl.tensor) -> tl.tensor:
    """Float32 below 2**22 rounded to whole numbers, ties to even: 1.5 * 2**23 leaves no room for a fraction."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def factor_of(amax: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """What values are multiplied with: levels / amax, finite also where all of them are zero."""
    return tl.minimum(tl.div_rn(LEVELS, tl.where(amax == 0.0, 1.0, amax)), 3.4028234663852886e38)


@triton.jit
def codes_of(values: tl.tensor, factor: tl.tensor, INTEGER: tl.constexpr) -> tl.tensor:
    """int8 or e4m3 codes of float32 values."""
    scaled = values * factor
    if INTEGER:
        codes = nearest(scaled).to(tl.int8)
    else:
        codes = scaled.to(tl.float8e4nv)
    return codes
