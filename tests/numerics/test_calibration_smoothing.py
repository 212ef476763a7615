"""Multipliers against their formulas in float64, and what their searches promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.quant.around import fold_around
from lightx2v.quant.calibration.search import (
    Found,
    OutputError,
    awq_search,
    flexible_search,
    on_span,
    svdquant_search,
)
from lightx2v.quant.calibration.smoothing import (
    balance,
    iterative_smooth,
    smoothquant,
    weight_absmax,
)


def linear(seed: int = 0, rows: int = 96, n: int = 48, k: int = 64) -> tuple[Tensor, list[Tensor]]:
    """Inputs with a few outlier channels, and two weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.randn(k, generator=generator).exp()
    x[:, :: k // 4 or 1] *= 30
    return x, [torch.randn(n, k, generator=generator) / k**0.5 for _ in range(2)]


def to_codes(values: Tensor, levels: int) -> Tensor:
    """Symmetric codes with a scale per row, as floats."""
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / levels
    return (values / scale).round() * scale


def error_of(x: Tensor, weights: list[Tensor], levels_w: int, levels_x: int | None) -> OutputError:
    quantize_x = None if levels_x is None else (lambda values: to_codes(values, levels_x))
    return OutputError(x, weights, lambda values: to_codes(values, levels_w), quantize_x)


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 40), alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), seed=st.integers(0, 99))
def test_formulas(k: int, alpha: float, seed: int) -> None:
    x, weights = linear(seed, 9, 5, k)
    a = [max(abs(float(value)) for value in x[:, i]) for i in range(k)]
    w = [max(abs(float(value)) for weight in weights for value in weight[:, i]) for i in range(k)]
    spans = torch.tensor(a)
    assert torch.equal(weight_absmax(weights), torch.tensor(w))
    plain = torch.tensor([w[i] ** (1 - alpha) / a[i] ** alpha for i in range(k)], dtype=torch.float64)
    torch.testing.assert_close(smoothquant(spans, weights, alpha).double(), plain, rtol=1e-5, atol=0)
    clamped = torch.tensor([1 / max(a[i] ** alpha / w[i] ** (1 - alpha), 0.5) for i in range(k)], dtype=torch.float64)
    found = iterative_smooth(spans, weights, alpha, smallest=0.5).double()
    torch.testing.assert_close(found, clamped, rtol=1e-5, atol=0)
    middle = math.sqrt(float(plain.min() * plain.max()))
    found = balance(spans, weight_absmax(weights), alpha, 1 - alpha).double()
    torch.testing.assert_close(found, plain / middle, rtol=1e-5, atol=0)


def test_smoothquant_evens_out_input_and_weight() -> None:
    x, weights = linear()
    m = smoothquant(x.abs().amax(0), weights)
    torch.testing.assert_close((x * m).abs().amax(0), weight_absmax([fold_around(w, m, 0) for w in weights]))


@pytest.mark.parametrize("dead", ["input", "weight", "both", "all"])
def test_channels_of_zeros_are_left_alone(dead: str) -> None:
    x, weights = linear()
    channels = slice(None) if dead == "all" else slice(3, 5)
    if dead != "weight":
        x[:, channels] = 0
    if dead != "input":
        for weight in weights:
            weight[:, channels] = 0
    spans, means = x.abs().amax(0), x.abs().mean(0)
    error = error_of(x, weights, 7, 7)
    found = [awq_search(means, weights, on_span(error, means), 0.25)]
    found.append(flexible_search(spans, weights, on_span(error, spans), 0.25))
    found.append(svdquant_search(spans, weights, on_span(error, spans), 4))
    multipliers = [smoothquant(spans, weights), iterative_smooth(spans, weights), *(each.multiplier for each in found)]
    for m in multipliers:
        assert m.dtype == torch.float32 and m.shape == (64,)
        assert bool((m > 0).all() and m.isfinite().all() and (m[channels] == 1).all())
        exact, same = x.double() @ weights[0].double().T, (x * m).double() @ fold_around(weights[0], m, 0).double().T
        assert float((same - exact).norm()) <= 1e-6 * float(exact.norm())


def test_the_output_error_is_its_definition() -> None:
    x, weights = linear()
    m = smoothquant(x.abs().amax(0), weights)
    wrong, right = 0.0, 0.0
    for weight in weights:
        exact = x.double() @ weight.double().T
        codes = to_codes(x * m, 127).double() @ to_codes(weight / m, 7).double().T
        wrong, right = wrong + float((codes - exact).square().sum()), right + float(exact.square().sum())
    assert error_of(x, weights, 7, 127)(m) == pytest.approx(wrong / right, rel=1e-3)


def test_the_output_error_with_a_low_rank_branch() -> None:
    x, weights = linear()

    def low_rank(weight: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return v[:4], u[:, :4] * s[:4]

    error = OutputError(x, weights, lambda w: to_codes(w, 7), lambda v: to_codes(v, 7), low_rank)
    wrong, right = 0.0, 0.0
    for weight in weights:
        down, up = low_rank(weight)
        exact = x.double() @ weight.double().T
        codes = to_codes(x, 7).double() @ to_codes(weight - up @ down, 7).double().T
        got = codes + x.double() @ down.double().T @ up.double().T
        wrong, right = wrong + float((got - exact).square().sum()), right + float(exact.square().sum())
    assert error(torch.ones(64)) == pytest.approx(wrong / right, rel=1e-3)


def test_searches_find_better_than_none_and_no_worse_than_their_grid() -> None:
    x, weights = linear()
    spans = x.abs().amax(0)
    both, weight_only = error_of(x, weights, 7, 7), error_of(x, weights, 7, None)
    none = both(torch.ones(64))
    tried = on_span(both, spans)
    flexible, svd = flexible_search(spans, weights, tried), svdquant_search(spans, weights, tried)
    assert flexible.error < 0.3 * none and svd.error < 0.3 * none
    assert flexible.error <= both(smoothquant(spans, weights)) * (1 + 1e-4)
    assert svd.error <= both(balance(spans, weight_absmax(weights), 0.45, 0.0)) * (1 + 1e-4)
    means = x.abs().mean(0)
    awq = awq_search(means, weights, on_span(weight_only, means))
    assert awq.error < 0.7 * weight_only(torch.ones(64))
    for found, error in ((flexible, both), (svd, both), (awq, weight_only)):
        assert found.error == error(found.multiplier)


def test_a_search_keeps_ones_where_nothing_is_better() -> None:
    x, weights = linear()

    def away_from_ones(multiplier: Tensor) -> float:
        return float((multiplier - 1).abs().sum())

    spans = x.abs().amax(0)
    for search in (awq_search, flexible_search, svdquant_search):
        found: Found = search(spans, weights, on_span(away_from_ones, spans))
        assert found.error == 0 and (found.alpha, found.beta) == (0, 0) and bool((found.multiplier == 1).all())
