"""From the statistics of an input and the float weights that read it to the tensors of quantized layers.

In this order: a multiplier for the channels of the input (smoothing), a rotation, a low-rank branch, the rounding of
what is left of the weight, and the range of the input where the mm_type has a calibrated one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightx2v.calibrate.fake import fake_weight
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.errors import ConfigError
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.around import Around, around_leaves, fold_around
from lightx2v.quant.blocks import global_scale
from lightx2v.quant.calibration.gptq import gptq
from lightx2v.quant.calibration.hqq import hqq
from lightx2v.quant.calibration.lowrank import decompose
from lightx2v.quant.calibration.observers import InputStatistics
from lightx2v.quant.calibration.ranges import find_range, range_parameters
from lightx2v.quant.calibration.rotation import fold_down, fold_gram
from lightx2v.quant.calibration.solved import grid_of, solvable, solved_leaves
from lightx2v.quant.formats import quantize_leaves, written_leaves
from lightx2v.quant.hadamard import LARGEST, rotation_size
from lightx2v.quant.numerics import FP8_MAX
from lightx2v.quant.spec import INT8_STEPS, QSpec


@dataclass(frozen=True)
class Solved:
    """The tensors of one layer by their last name, without its bias, and what is told of it."""

    leaves: Mapping[str, Tensor]
    told: Mapping[str, float | int | str] = field(default_factory=dict)


def check_recipe(recipe: CalibrationConfig, schemes: Mapping[str, Scheme]) -> None:
    """Raise ConfigError for a recipe that cannot be followed for any layer of `schemes`."""
    kinds = {scheme.weight for scheme in schemes.values() if scheme.weight is not None}
    if not any(solves(recipe, spec) for spec in kinds):
        allowed = {"gptq": "integers, nf4, fp4, nvfp4 and mxfp4", "hqq": "int<bits>-g<size>-asym"}[recipe.solver]
        names = ", ".join(sorted({f"'{scheme.name}'" for scheme in schemes.values()}))
        raise ConfigError("calibration.solver", f"{recipe.solver} makes no codes of {names}", allowed=allowed)
    rotation = recipe.rotation
    if isinstance(rotation, int) and (rotation & (rotation - 1) or rotation > LARGEST):
        raise ConfigError("calibration.rotation", f"is {rotation}", allowed=f"a power of two up to {LARGEST}, or auto")


def solves(recipe: CalibrationConfig, spec: QSpec) -> bool:
    """Whether the recipe's solver makes codes of `spec`; weights of other layers are rounded to nearest."""
    if recipe.solver == "gptq":
        return solvable(spec)
    return recipe.solver == "nearest" or (spec.is_integer and not spec.symmetric)


def rotation_of(recipe: CalibrationConfig, k: int) -> int:
    """The channels that the rotation of an input of k channels mixes; 0 for none."""
    if recipe.rotation is None:
        return 0
    return rotation_size(k) if recipe.rotation == "auto" else min(recipe.rotation, rotation_size(k))


def solve_layer(
    recipe: CalibrationConfig,
    scheme: Scheme,
    weight: Tensor,
    seen: InputStatistics,
    around: Around,
    multiplied: bool = False,
) -> Solved:
    """The tensors of a weight [N, K] under the multiplier and rotation of `around`, but for the range of its input.

    `multiplied`: what makes the input will give it times the multiplier, which is then not stored.
    """
    spec = scheme.weight
    assert spec is not None
    folded = fold_around(weight, around.multiplier, around.rotation)
    told: dict[str, float | int | str] = {}
    branch: dict[str, Tensor] = {}
    if recipe.rank:
        rows = None if seen.sample is None else around.input(seen.sample.rows.to(folded.device).float())
        found = decompose(folded, recipe.rank, fake_weight(spec), rows=rows, iterations=recipe.iterations)
        down = fold_down(found.down, None if multiplied else around.multiplier, around.rotation)
        branch = {"lowrank_down": down.bfloat16(), "lowrank_up": found.up.bfloat16()}
        told |= {"rank": recipe.rank, "refinements": len(found.errors)}
        folded = found.residual
    leaves = written_leaves(_rounded(recipe, spec, folded, seen, around), spec)
    stored = Around(None if multiplied else around.multiplier, around.rotation)
    return Solved({**leaves, **around_leaves(stored), **branch}, told)


def _rounded(
    recipe: CalibrationConfig, spec: QSpec, weight: Tensor, seen: InputStatistics, around: Around
) -> dict[str, Tensor]:
    if recipe.solver == "nearest" or not solves(recipe, spec):
        return quantize_leaves(weight, spec)
    if recipe.solver == "gptq":
        assert seen.gram is not None
        gram = fold_gram(seen.gram.to(weight.device), around.multiplier, around.rotation)
        groups = gptq(weight, gram, grid_of(spec, weight), act_order=recipe.act_order)
    else:
        assert spec.bits is not None
        groups = hqq(weight, int(spec.bits), spec.size)
    return solved_leaves(groups, spec, weight)


def wants_range(spec: QSpec | None) -> bool:
    """Whether inputs of `spec` are quantized by what a checkpoint says of their range."""
    return spec is not None and (
        spec.is_calibrated or (spec.dtype, spec.granularity, spec.dynamic) == _FP8 or _nvfp4(spec)
    )


_FP8 = ("fp8", "tensor", False)


def _nvfp4(spec: QSpec) -> bool:
    return spec.dtype == "nvfp4"


def input_leaves(
    recipe: CalibrationConfig, spec: QSpec, seen: Mapping[int, InputStatistics], first: list[int], steps: int
) -> dict[str, Tensor]:
    """`input_scale` and the like, of the statistics of each group of steps, which begin at the steps `first`."""
    if not spec.is_calibrated:
        absmax = max(float(one.absmax.max()) for one in seen.values())
        if _nvfp4(spec):
            return {"input_global_scale": global_scale(torch.tensor(absmax))}
        return {"input_scale": torch.tensor([max(absmax, 1e-12) / FP8_MAX])}
    found = []
    for group in range(len(first)):
        histogram = seen[group].histogram
        assert histogram is not None
        limits = find_range(histogram, recipe.observer, symmetric=spec.symmetric, percent=recipe.percent)
        found.append(range_parameters(limits, symmetric=spec.symmetric))
    leaves = {"input_scale": torch.tensor([scale for scale, _ in found])}
    if not spec.symmetric:
        leaves["input_zero"] = torch.tensor([zero for _, zero in found], dtype=torch.float32)
    if spec == INT8_STEPS:
        leaves["input_steps"] = torch.tensor([steps, *first], dtype=torch.int32)
    return leaves
