"""Scales that a caller gives with the weights: where they come from, and what they make of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io.pickles import read_state
from lightx2v.io.weights import Checkpoint
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.layouts import FLOATS, short
from lightx2v.quant.numerics import FP8_MAX, expand_scale
from lightx2v.quant.spec import QSpec

SCALES_FILE = "fp8_scales.safetensors"
_OLDER_FILE = "fp8_scales.pth"

_E4M3 = torch.float8_e4m3fn
_SATURATED = 0.01
"""Part of the weights that may lie beyond the largest code before a scale counts as another weight's."""
_NEAR = 0.01
"""Relative difference of a given scale to the one of the weight, below which it is that."""

Scales = Mapping[str, Tensor]


def read_scales(scale: Any) -> dict[str, Tensor]:
    """Scales by name from a dict, a .safetensors or torch file, or a directory with fp8_scales.safetensors (or .pth).

    Torch files are read without running code. Raises ConfigError and CheckpointError.
    """
    if isinstance(scale, Mapping):
        found = {str(name): torch.as_tensor(value) for name, value in scale.items()}
    elif isinstance(scale, str | Path):
        found = _read_file(_scales_file(Path(scale).expanduser()))
    else:
        raise ConfigError(
            "scale", f"is a {type(scale).__name__}", allowed="a dict of names to scales, a file, or a directory"
        )
    if not found:
        raise ConfigError("scale", "is empty", do="leave it out to quantize a model that has no scales")
    return found


def _scales_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (SCALES_FILE, _OLDER_FILE):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        str(path), f"has neither {SCALES_FILE} nor {_OLDER_FILE}", do="give the directory of an export"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        checkpoint = Checkpoint.open(path)
        return {name: tensor.clone() for name, tensor in checkpoint.stream()}
    return read_state(path)


def key_of(scales: Scales, name: str) -> str | None:
    """The key of the scale of the layer `name`: `<name>.weight_scale`, or else `<name>`."""
    return next((key for key in (f"{name}.weight_scale", name) if key in scales), None)


def fit(scale: Tensor, spec: QSpec, n: int, k: int, where: str) -> Tensor:
    """A scale in the shape that a weight [n, k] of `spec` has it in, as float32.

    One number stands for all channels or blocks; channels may be [N], [N, 1] or [1, N]. Raises CheckpointError for
    other shapes, and for scales that are negative, inf or NaN.
    """
    if scale.dtype not in FLOATS:
        raise CheckpointError(where, f"its scale is {short(scale.dtype)}", allowed="a floating-point type")
    scale = scale.detach().float()
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CheckpointError(where, "its scale is negative, inf or NaN", do="quantize the model again")
    wanted = spec.scale_shape(n, k)
    if scale.numel() == 1:
        return scale.reshape(1).expand(math.prod(wanted)).reshape(wanted)
    shapes = [(n, 1), (1, n), (n,)] if spec.granularity in ("tensor", "channel") else [wanted]
    if tuple(scale.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in [*shapes, ()])
        raise CheckpointError(where, f"its scale has shape {list(scale.shape)}", allowed=allowed)
    return scale.reshape(shapes[0]).contiguous()


@torch.no_grad()
def with_scale(weight: Tensor, scale: Tensor, spec: QSpec, where: str) -> dict[str, Tensor]:
    """Codes [N, K] and scale of a weight under a given scale.

    A weight that holds codes, as float8_e4m3fn or as numbers that all are some, is taken as it is. Any other is divided
    by the scale. Raises CheckpointError for a scale that does not fit the weight.
    """
    n, k = weight.shape
    scale = fit(scale, spec, n, k, where).to(weight.device)
    if weight.dtype == _E4M3:
        codes = weight
    elif weight.dtype not in FLOATS:
        raise CheckpointError(where, f"its weight is {short(weight.dtype)}", allowed="float8_e4m3fn, or floats")
    elif _holds_codes(weight) and not _is_own(weight, scale, spec):
        codes = weight.to(_E4M3)
    else:
        codes = _divided(weight, scale, spec, where)
    if bool(((expand_scale(scale, spec, codes.shape) == 0) & (codes.float() != 0)).any()):
        raise CheckpointError(where, "its scale is 0, under which the weight would be lost", do="quantize it again")
    return {"weight": codes, "weight_scale": scale}


def _holds_codes(weight: Tensor) -> bool:
    return torch.equal(weight.to(_E4M3).to(weight.dtype), weight)


def _is_own(weight: Tensor, scale: Tensor, spec: QSpec) -> bool:
    """Whether `scale` is what the weight itself gives: then it is not quantized, though e4m3 has all its values."""
    own = quantize_leaves(weight, spec)["weight_scale"]
    return scale.shape == own.shape and torch.allclose(own, scale, rtol=_NEAR, atol=0.0)


def _divided(weight: Tensor, scale: Tensor, spec: QSpec, where: str) -> Tensor:
    divisor = expand_scale(scale, spec, weight.shape)
    scaled = torch.where(divisor > 0, weight.float() / divisor, torch.where(weight == 0, 0.0, torch.inf))
    # e4m3 rounds up to 464 down to its largest number.
    beyond = int((scaled.abs() > FP8_MAX + 16).sum())
    if beyond > _SATURATED * weight.numel():
        raise CheckpointError(
            where,
            f"its scale does not fit: {100 * beyond / weight.numel():.0f} % of the weights are beyond the largest code",
            do="give the scales of these weights, or none to find them",
        )
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(_E4M3)
