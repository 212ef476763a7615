"""Between specs and the solvers: the grid of a spec's codes, and a weight's tensors from what was solved."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.quant import blocks
from lightx2v.quant.calibration.grids import CodebookGrid, Grid, Groups, IntegerGrid, dequantize
from lightx2v.quant.codebook import is_double, quantize_scales, values_of
from lightx2v.quant.integers import encode_integers
from lightx2v.quant.minifloat import E2M1
from lightx2v.quant.numerics import FP8_MAX
from lightx2v.quant.packing import pack4
from lightx2v.quant.spec import CODEBOOKS, QSpec


def solvable(spec: QSpec) -> bool:
    """Whether `grid_of` has a grid for weights of this spec."""
    plain_int8 = spec.dtype == "int8" and spec.granularity == "channel"
    return plain_int8 or spec.is_integer or spec.dtype in (*CODEBOOKS, "nvfp4", "mxfp4")


def grid_of(spec: QSpec, weight: Tensor, shrink: bool = False) -> Grid:
    """The grid of a spec's codes for a weight [N, K]; `shrink` as in `IntegerGrid`.

    nvfp4's scales depend on the largest value of the weight. Raises LightX2VError for a spec that is not `solvable`.
    """
    if not solvable(spec):
        raise LightX2VError("calibration", f"no solver for {spec}", allowed="integers, nf4, fp4, nvfp4, mxfp4")
    if spec.dtype in CODEBOOKS:
        return CodebookGrid(values_of(spec), spec.size)
    if spec.dtype == "nvfp4":
        over = blocks.global_scale(weight.abs().amax())
        return CodebookGrid(tuple(E2M1.values()), spec.size, lambda scale: _e4m3(scale, over).float() / over)
    if spec.dtype == "mxfp4":
        return CodebookGrid(tuple(E2M1.values()), spec.size, _power_of_two)
    assert spec.bits is not None
    return IntegerGrid(int(spec.bits), spec.size if spec.granularity == "group" else 0, spec.symmetric, shrink)


def solved_leaves(groups: Groups, spec: QSpec, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that `formats.quantize_leaves` would give, of what a solver made of a weight [N, K].

    The solver's grid was that of `grid_of(spec, weight)`, or one with other scales of the same kind.
    """
    k = groups.codes.shape[1]
    if spec.dtype == "int8" and not spec.is_integer:
        return {"weight": (groups.codes ^ 128).view(torch.int8), "weight_scale": groups.scale}
    if spec.is_integer:
        values = dequantize(groups, grid_of(spec, weight))
        return encode_integers(values, spec, groups.scale, groups.zero)
    table = values_of(spec) if spec.dtype in CODEBOOKS else tuple(E2M1.values())
    packed = pack4(F.pad(groups.codes, (0, spec.filled(k) - k), value=table.index(0.0)))
    if spec.dtype == "mxfp4":
        return {"weight": packed, "weight_scale": groups.scale.to(blocks.E8M0)}
    if spec.dtype == "nvfp4":
        over = blocks.global_scale(weight.abs().amax())
        return {"weight": packed, "weight_scale": _e4m3(groups.scale, over), "weight_global_scale": over}
    return {"weight": packed, **(quantize_scales(groups.scale) if is_double(spec) else {"weight_scale": groups.scale})}


def _e4m3(scale: Tensor, over: Tensor) -> Tensor:
    """Scales of nvfp4's groups as they are stored under a scale of the tensor."""
    return (scale * over).clamp(max=FP8_MAX).to(blocks.E4M3)


def _power_of_two(scale: Tensor) -> Tensor:
    """The next power of two, at least 2^-126: below, float32 is not exact."""
    fraction, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), (exponent - (fraction == 0.5).int()).clamp(min=-126))
