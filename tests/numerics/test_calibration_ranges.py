"""Rules for ranges: their errors by rounding the values themselves in float64, and the rules by what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.quant.calibration.histogram import Histogram
from lightx2v.quant.calibration.ranges import (
    Method,
    Range,
    expected_error,
    find_range,
    histogram_window,
    range_parameters,
    recall_scale,
    recall_window,
)

METHODS: list[Method] = ["minmax", "percentile", "mse", "histogram", "mix"]


def heavy_tails(seed: int = 0, values: int = 50_000) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(values, generator=generator) * torch.rand(values, generator=generator).pow(-0.25)


def histogram_of(values: Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(values.reshape(1, -1))
    return histogram


def rounding_error(values: Tensor, found: Range, symmetric: bool, bits: int = 8) -> float:
    """The mean squared error of the values as codes, from the definition of the codes."""
    scale, zero = range_parameters(found, symmetric=symmetric, bits=bits)
    assert zero == 0 if symmetric else zero == round(zero)
    half, exact = 2 ** (bits - 1), values.double()
    codes = (exact / scale + zero).round().clamp(-half + symmetric, half - 1)
    return float(((codes - zero) * scale - exact).square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("found", [Range(-3, 3), Range(-0.17, 9), Range(2, 5), Range(-40, 60)])
def test_the_expected_error_is_that_of_the_values(found: Range, symmetric: bool, bits: int) -> None:
    values = heavy_tails()
    expected = expected_error(histogram_of(values), found, symmetric=symmetric, bits=bits)
    assert expected == pytest.approx(rounding_error(values, found, symmetric, bits), rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", ["tails", "gelu", "positive"])
def test_searched_ranges_are_better_than_the_extremes(shape: str, bits: int, symmetric: bool) -> None:
    values = heavy_tails()
    values = {"tails": values, "gelu": torch.nn.functional.gelu(values), "positive": values.abs() + 1}[shape]
    histogram = histogram_of(values)
    errors = {
        method: rounding_error(values, find_range(histogram, method, symmetric=symmetric, bits=bits), symmetric, bits)
        for method in METHODS
    }
    share = 0.95 if bits == 8 else 0.8
    assert errors["mse"] < share * errors["minmax"] and errors["histogram"] < share * errors["minmax"]
    assert errors["mse"] <= 1.02 * errors["histogram"]
    largest = float(values.abs().max())
    for share in (0.1, 0.3, 0.6, 0.8):  # nor does any other clip do much better
        low, high = (max(-share * largest, float(values.min())), share * largest)
        assert errors["mse"] <= 1.05 * rounding_error(values, Range(low, high), symmetric, bits)


def test_the_histogram_rule_is_not_worse_than_torchs_observer() -> None:
    observers = pytest.importorskip("torch.ao.quantization.observer")
    values = heavy_tails(1)
    for symmetric, scheme in ((True, torch.per_tensor_symmetric), (False, torch.per_tensor_affine)):
        observer = observers.HistogramObserver(dtype=torch.qint8, qscheme=scheme)
        observer(values)
        low, high = (float(end) for end in observer._non_linear_param_search())
        found = find_range(histogram_of(values), "histogram", symmetric=symmetric)
        ours, theirs = (rounding_error(values, ends, symmetric) for ends in (found, Range(low, high)))
        assert ours <= 1.02 * theirs


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), values=st.integers(1, 3000), percent=st.sampled_from([90.0, 99.0, 99.9]))
def test_percentiles_leave_that_share_out(seed: int, values: int, percent: float) -> None:
    data = heavy_tails(seed, values)
    histogram = histogram_of(data)
    width = float(histogram.limit) / (histogram.bins // 2)
    for symmetric in (True, False):
        found = find_range(histogram, "percentile", symmetric=symmetric, percent=percent)
        largest = max(found.high, -found.low)
        measured = data.double().abs() if symmetric else data.double()
        for end, share in (
            ((largest, percent / 100),)
            if symmetric
            else (
                (found.low, (1 - percent / 100) / 2),
                (found.high, (1 + percent / 100) / 2),
            )
        ):
            assert int((measured < end - width).sum()) <= share * values + 1e-6
            assert int((measured <= end + width).sum()) >= share * values - 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-30, 7.5, -7.5, 3e4])
def test_one_value_is_a_code(method: Method, symmetric: bool, value: float) -> None:
    data = torch.full((5,), value)
    found = find_range(histogram_of(data), method, symmetric=symmetric)
    assert rounding_error(data, found, symmetric) <= max(1e-5, 0.02 * abs(value)) ** 2


def test_nothing_seen_has_a_scale() -> None:
    for method in METHODS:
        scale, zero = range_parameters(find_range(Histogram(), method, symmetric=False), symmetric=False)
        assert scale > 0 and -128 <= zero <= 127


def test_mix_takes_the_extremes_of_wide_tensors() -> None:
    values = heavy_tails()
    narrow, wide = (histogram_of(values * (size / float(values.max() - values.min()))) for size in (49, 51))
    assert find_range(narrow, "mix", symmetric=False) == find_range(narrow, "histogram", symmetric=False)
    assert find_range(wide, "mix", symmetric=False) == find_range(wide, "minmax", symmetric=False)


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 3), values=st.integers(1, 200), ratio=st.sampled_from([0.5, 0.9, 1.0]), seed=st.integers(0, 99)
)
def test_the_recall_window_is_the_shortest(heads: int, values: int, ratio: float, seed: int) -> None:
    data = heavy_tails(seed, heads * values).view(heads, values)
    low, high = recall_window(data, ratio)
    held = max(1, int(ratio * values))
    for head in range(heads):
        ordered = sorted(data[head].tolist())
        lengths = [ordered[start + held - 1] - ordered[start] for start in range(values - held + 1)]
        assert float(high[head] - low[head]) == pytest.approx(min(lengths), abs=1e-5)
        assert int(((data[head] >= low[head]) & (data[head] <= high[head])).sum()) >= held


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.999, 1.0])
def test_streamed_windows_are_those_of_all_values(ratio: float) -> None:
    data = heavy_tails(2, 60_000).view(3, -1) * torch.tensor([[1.0], [30.0], [0.0]]) + torch.tensor([[5.0], [0], [0]])
    histogram = Histogram(3)
    for part in data.split(6000, dim=1):
        histogram.update(part)
    (low, high), (exact_low, exact_high) = histogram_window(histogram, ratio), recall_window(data, ratio)
    bins = 2 * histogram.limit / histogram.bins
    assert bool((high - low <= exact_high - exact_low + 2 * bins).all())
    assert bool((((data >= low[:, None]) & (data <= high[:, None])).sum(1) >= int(ratio * data.shape[1])).all())
    if ratio == 1:
        assert torch.equal(low, data.amin(1)) and torch.equal(high, data.amax(1))


def test_recall_scales_are_symmetric() -> None:
    low, high = torch.tensor([-3.0, -1.0, 2.0, 0.0]), torch.tensor([1.0, 127.0, 12.7, 0.0])
    torch.testing.assert_close(recall_scale(low, high), torch.tensor([3 / 127, 1.0, 0.1, 1e-5 / 127]))
