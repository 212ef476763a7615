"""What weights and inputs become when they are quantized, as floats: what searches compare with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightx2v.quant.activations import quantize_input
from lightx2v.quant.formats import dequantize_leaves, quantize_leaves
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import QSpec


def fake_weight(spec: QSpec) -> Callable[[Tensor], Tensor]:
    """From a weight [N, K] to what its codes stand for."""
    return lambda weight: dequantize_leaves(quantize_leaves(weight, spec), spec)[:, : weight.shape[1]]


def fake_input(spec: QSpec | None, limit: float | None = None) -> Callable[[Tensor], Tensor] | None:
    """From an input [M, K] to what its codes stand for; None where inputs stay as they are.

    `limit` is the largest absolute value of all inputs, which a scale for all of them goes by; None: of this one.
    """
    if spec is None:
        return None
    if spec.is_calibrated:
        return lambda x: _whole(x, spec.symmetric, limit)

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


def _whole(x: Tensor, symmetric: bool, limit: float | None) -> Tensor:
    """int8 with one scale for all of x, as if its range went to `limit`."""
    low, high = float(x.min()), float(x.max())
    if limit is not None and (size := max(-low, high)) > 0:
        low, high = low * limit / size, high * limit / size
    if symmetric:
        scale = max(-low, high, 1e-12) / 127
        return (x / scale).round() * scale
    scale = max(high - low, 1e-12) / 255
    zero = round(-128 - low / scale)
    return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale
