"""What weights and inputs become when they are quantized, as floats: what searches compare with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightx2v.quant.activations import quantize_input
from lightx2v.quant.calibration.ranges import Range, range_parameters
from lightx2v.quant.formats import dequantize_leaves, quantize_leaves
from lightx2v.quant.numerics import INT8_MAX, Quantized
from lightx2v.quant.spec import QSpec


def fake_weight(spec: QSpec) -> Callable[[Tensor], Tensor]:
    """From a weight [N, K] to what its codes stand for."""
    return lambda weight: dequantize_leaves(quantize_leaves(weight, spec), spec)[:, : weight.shape[1]]


def fake_input(spec: QSpec | None, limits: Range | None = None) -> Callable[[Tensor], Tensor] | None:
    """From an input [M, K] to what its codes stand for; None where inputs stay as they are.

    `limits` is the range that was found beforehand, where `spec` has one; None: that of the input itself.
    """
    if spec is None:
        return None
    if spec.is_calibrated:
        return lambda x: _whole(x, spec.symmetric, limits or Range(float(x.min()), float(x.max())))

    def fake(x: Tensor) -> Tensor:
        codes, scale = quantize_input(x, spec)
        if spec.dtype == "nvfp4":
            codes, scale = codes, scale[:, :-1] * scale[:, -1:]
        return _values(Quantized(codes, scale), spec)[:, : x.shape[1]]

    return fake


def _values(x: Quantized, spec: QSpec) -> Tensor:
    size = spec.size or x.codes.shape[1]
    return (
        x.codes.float().unflatten(1, (-1, size)) * x.scale.float().reshape(-1, x.codes.shape[1] // size, 1)
    ).flatten(1)


def _whole(x: Tensor, symmetric: bool, limits: Range) -> Tensor:
    """int8 with one scale; what lies outside of its range is cut off."""
    scale, zero = range_parameters(limits, symmetric=symmetric)
    least = -INT8_MAX if symmetric else -INT8_MAX - 1
    return ((x / scale).round() + zero).clamp(least, INT8_MAX).sub(zero) * scale
