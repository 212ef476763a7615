"""Codes and scales against float64, and the roundings of the libraries against their sources."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.quant.numerics import (
    ANGELSLIM,
    FP8_MAX,
    INT8_MAX,
    WEIGHT_MIN_AMAX,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
    quantize_whole_bfloat16,
    rounding_of,
)
from lightx2v.quant.spec import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
    QSpec,
)

LEVELS = {"int8": INT8_MAX, "fp8": FP8_MAX}
LIBRARIES = ("torch_native", "vllm", "sgl", "torchao", "triton", "deepgemm")
FP16_MAX, FP16_TINY = 65504.0, 6e-8


def values(rows: int, columns: int, magnitude: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * magnitude


def spread(scale: Tensor, spec: QSpec, shape: torch.Size) -> Tensor:
    """The scale of each element, in float64."""
    rows = scale.double().repeat_interleave(spec.size if spec.granularity == "block" else 1, dim=0)[: shape[0]]
    return rows.repeat_interleave(spec.size or shape[1], dim=1)[:, : shape[1]]


def rounding_error(exact: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """The most that rounding to the nearest code may change each value: half a step of int8 or of e4m3."""
    if dtype == "int8":
        return scale * 0.5
    return torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10)


@settings(max_examples=40, deadline=None)
@given(
    spec=st.sampled_from([INT8_CHANNEL, FP8_CHANNEL, FP8_BLOCK128]),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    magnitude=st.sampled_from([0.0, FP16_TINY, 1e-3, 1.0, FP16_MAX]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_weights_are_rounded_to_the_nearest_code(
    spec: QSpec, rows: int, columns: int, magnitude: float, dtype: torch.dtype, seed: int
) -> None:
    weight = values(rows, columns, magnitude, seed).to(dtype)
    codes, scale = quantize_weight(weight, spec)
    assert scale.dtype == torch.float32 and scale.shape == spec.scale_shape(rows, columns)
    exact, each = weight.double(), spread(scale, spec, weight.shape)
    assert (each >= WEIGHT_MIN_AMAX / LEVELS[spec.dtype] * (1 - 1e-6)).all()
    error = (dequantize_weight(codes, scale, spec).double() - exact).abs()
    assert (error <= rounding_error(exact, each, spec.dtype) * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from([INT8_TOKEN, FP8_TOKEN, FP8_GROUP128]),
    rows=st.integers(0, 5),
    columns=st.integers(1, 300),
    magnitude=st.sampled_from([0.0, FP16_TINY, 1e-3, 1.0, FP16_MAX]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_activations_are_rounded_to_the_nearest_code(
    spec: QSpec, rows: int, columns: int, magnitude: float, dtype: torch.dtype, seed: int
) -> None:
    x = values(rows, columns, magnitude, seed).to(dtype)
    codes, scale = quantize_activation(x, spec)
    assert codes.shape == x.shape and scale.dtype == torch.float32 and scale.shape == spec.scale_shape(rows, columns)
    exact, each = x.double(), spread(scale, spec, x.shape)
    # amax / levels is rounded once, and so may move a value over the middle between two codes.
    limit = rounding_error(exact, each, spec.dtype) + exact.abs() * 1e-6
    assert ((codes.double() * each - exact).abs() <= limit).all()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "spec", [INT8_TOKEN, FP8_TOKEN, FP8_GROUP128], ids=lambda spec: f"{spec.dtype}-{spec.granularity}"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_rounding_is_finite_and_near(library: str, spec: QSpec, dtype: torch.dtype) -> None:
    for magnitude in (0.0, 1e-40, FP16_TINY, 1.0, 6e4):
        x = values(4, 130, magnitude, seed=1).to(dtype)
        codes, scale = quantize_activation(x, spec, rounding_of(library, spec))
        back = codes.double() * spread(scale, spec, x.shape)
        assert back.isfinite().all()
        if magnitude >= 1:
            assert (back - x.double()).abs().max() <= 0.07 * magnitude
        elif magnitude == 0:
            assert not codes.float().any()


def test_codes_are_int8_ties_as_each_library_rounds_them() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5]])
    even, away = (
        quantize_activation(x, INT8_TOKEN, rounding_of(library, INT8_TOKEN)).codes for library in ("vllm", "sgl")
    )
    assert even.tolist() == [[127, 0, 2, -2]]
    assert away.tolist() == [[127, 1, 2, -3]]


@pytest.mark.parametrize(
    ("library", "spec", "x", "scale"),
    [
        ("vllm", FP8_TOKEN, 0.0, 1 / (448 * 512)),
        ("sgl", FP8_TOKEN, 0.0, 0.0),
        ("triton", FP8_TOKEN, 0.0, 0.0),
        ("deepgemm", FP8_GROUP128, 1e-6, 1e-4 / 448),
        ("sgl", FP8_GROUP128, 0.0, 1e-10 / 448),
        ("torchao", INT8_TOKEN, 0.0, 1e-5),
    ],
)
def test_smallest_scale_of_each_library(library: str, spec: QSpec, x: float, scale: float) -> None:
    got = quantize_activation(torch.full((1, 8), x), spec, rounding_of(library, spec)).scale
    assert got.item() == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("fault", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "spec", [INT8_TOKEN, FP8_TOKEN, FP8_GROUP128], ids=lambda spec: f"{spec.dtype}-{spec.granularity}"
)
def test_a_fault_in_a_row_shows_in_its_scale_alone(spec: QSpec, fault: float) -> None:
    x = torch.ones(2, 16)
    x[0, 3] = fault
    scale = quantize_activation(x, spec).scale
    assert not scale[0].isfinite().any() and scale[1].isfinite().all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-10, FP16_TINY, 1.0, 1e38])
def test_a_whole_tensor_in_bfloat16_rounds_multiplier_and_products_to_it(magnitude: float) -> None:
    """angelslim's fp8_per_tensor_quant, in float64 with each rounding to bfloat16 written out."""
    for seed in range(20):
        x = values(7, 11, magnitude, seed).bfloat16()
        codes, scale = quantize_whole_bfloat16(x, ANGELSLIM)
        amax = x.double().abs().max().clamp(min=1e-12).bfloat16().double()
        multiplier = ((1 / amax).bfloat16().double() * FP8_MAX).bfloat16().double()
        scaled = (x.double() * multiplier).bfloat16().clamp(-FP8_MAX, FP8_MAX)
        assert torch.equal(codes.float(), scaled.to(torch.float8_e4m3fn).float())
        assert scale.shape == (1,) and scale.item() == pytest.approx(1 / multiplier.item(), rel=1e-7)
        assert codes.float().isfinite().all() and scale.isfinite().all() and scale > 0
