"""Factors of low rank beside a quantized rest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.quant.around import fold_around
from lightx2v.quant.calibration.gptq import gptq
from lightx2v.quant.calibration.grids import IntegerGrid, dequantize, fake_quantize
from lightx2v.quant.calibration.lowrank import decompose, truncated_svd
from lightx2v.quant.calibration.search import OutputError, on_span, svdquant_search
from lightx2v.quant.calibration.smoothing import smoothquant

INT4 = IntegerGrid(4, 64)


def to_int4(values: Tensor) -> Tensor:
    return fake_quantize(values, INT4)


def matrix(n: int, k: int, seed: int = 0, decay: float = 0.0) -> Tensor:
    """A random matrix whose singular values fall as a power of their number."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(n, k, generator=generator) / k**0.5
    if decay:
        left, values, right = torch.linalg.svd(made, full_matrices=False)
        made = (left * values[0] * torch.arange(1, len(values) + 1).pow(-decay)) @ right
    return made


def with_outliers(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and a weight, each with outlier channels of its own, like those of a transformer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, k, generator=generator) * (0.5 * torch.randn(k, generator=generator)).exp()
    x[:, torch.randperm(k, generator=generator)[: k // 32]] *= 20
    weight = matrix(n, k, seed + 1) * (0.3 * torch.randn(k, generator=generator)).exp()
    weight[:, torch.randperm(k, generator=generator)[: k // 64]] *= 8
    return x, weight


def best_error(exact: Tensor, rank: int) -> float:
    """Of any approximation of that rank (Eckart, Young)."""
    return float(torch.linalg.svdvals(exact.double())[rank:].square().sum().sqrt())


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 40), rank=st.integers(1, 50), seed=st.integers(0, 99))
def test_small_matrices_are_decomposed_exactly(n: int, k: int, rank: int, seed: int) -> None:
    exact = matrix(n, k, seed)
    down, up = truncated_svd(exact, rank)
    kept = min(rank, n, k)
    assert down.shape == (kept, k) and up.shape == (n, kept)
    error = float((up.double() @ down.double() - exact.double()).norm())
    assert error == pytest.approx(best_error(exact, kept), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("n", "k"), [(600, 700), (700, 600)])
@pytest.mark.parametrize(("decay", "share"), [(0.0, 1.02), (0.5, 1.01), (1.0, 1.005)])
def test_large_matrices_nearly_so(n: int, k: int, decay: float, share: float) -> None:
    exact = matrix(n, k, 3, decay)
    down, up = truncated_svd(exact, 32)
    assert float((up @ down - exact).norm()) <= share * best_error(exact, 32)
    again = truncated_svd(exact, 32)
    assert torch.equal(again[0], down) and torch.equal(again[1], up)
    # One turn more from where it ended is not worse.
    further = truncated_svd(exact, 32, power_iterations=1, start=down)
    assert float((further[1] @ further[0] - exact).norm()) <= float((up @ down - exact).norm()) * 1.0001


@pytest.mark.parametrize("given_rows", [False, True])
def test_errors_fall_turn_after_turn(given_rows: bool) -> None:
    x, weight = with_outliers(96, 192)
    found = decompose(weight, 32, to_int4, rows=x if given_rows else None, tolerance=1e-3)
    torch.testing.assert_close(found.up @ found.down + found.residual, weight)
    assert len(found.errors) >= 4
    assert all(later < earlier for earlier, later in zip(found.errors[:-2], found.errors[1:-1], strict=True))
    error = (found.residual - to_int4(found.residual)).double()
    whole = weight.double()
    if given_rows:
        error, whole = error @ x.double().T, whole @ x.double().T
    assert float(error.norm() / whole.norm()) == pytest.approx(min(found.errors), rel=1e-3)
    assert min(found.errors) < 0.95 * found.errors[0]


def test_more_turns_and_a_higher_rank_are_better() -> None:
    _, weight = with_outliers(96, 192)
    errors = [
        min(decompose(weight, rank, to_int4, iterations=turns).errors) for rank, turns in ((8, 1), (8, 9), (32, 9))
    ]
    plain = float((weight - to_int4(weight)).norm() / weight.norm())
    assert errors[2] < errors[1] < errors[0] < plain


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (5, 130)])
def test_any_shape_and_zeros(shape: tuple[int, int]) -> None:
    for weight in (matrix(*shape), torch.zeros(shape)):
        found = decompose(weight.to(torch.bfloat16), 32, to_int4)
        assert found.residual.shape == shape and found.residual.dtype == torch.float32
        torch.testing.assert_close(found.up @ found.down + found.residual, weight.bfloat16().float(), rtol=0, atol=1e-5)
        assert min(found.errors) < 0.01


def test_a_large_weight_that_is_of_low_rank_is_done_at_once() -> None:
    for weight in (matrix(600, 3) @ matrix(3, 700), torch.zeros(600, 700)):
        found = decompose(weight, 8, to_int4)
        assert len(found.errors) <= 2 and found.errors[0] < 1e-5
        assert bool(found.up.isfinite().all() and found.down.isfinite().all())


def decibels(wrong: Tensor, exact: Tensor) -> float:
    return 20 * math.log10(float(exact.norm()) / float((wrong - exact).norm()))


def test_smoothing_and_a_low_rank_branch_are_decibels_above_plain_w4a4() -> None:
    x, weight = with_outliers(128, 256)
    seen, unseen = x[:384], x[384:]
    exact = unseen.double() @ weight.double().T

    def result(m: Tensor, rank: int, by_gptq: bool = False) -> float:
        smoothed, inputs = fold_around(weight, m, 0), unseen * m
        branch = torch.zeros_like(exact)
        rest = smoothed
        if rank:
            found = decompose(smoothed, rank, to_int4, rows=seen * m)
            rest, branch = found.residual, (inputs @ found.down.T @ found.up.T).double()
        rounded = to_int4(rest)
        if by_gptq:
            gram = (seen * m).T @ (seen * m)
            rounded = dequantize(gptq(rest, gram, INT4), INT4)
        return decibels(branch + to_int4(inputs).double() @ rounded.double().T, exact)

    spans = seen.abs().amax(0)
    none, smooth = torch.ones(256), smoothquant(spans, [weight])
    error = OutputError(seen[:128], [weight], to_int4, to_int4, lambda smoothed: truncated_svd(smoothed, 32))
    searched = svdquant_search(spans, [weight], on_span(error, spans), 10).multiplier
    plain, smooth_only, both, best = result(none, 0), result(smooth, 0), result(smooth, 32), result(searched, 32)
    assert plain + 3 < smooth_only and smooth_only + 3 < both and both + 1 < best
    # Inputs of four bits leave an error of their own, which no rounding of the weight mends.
    assert result(searched, 32, by_gptq=True) > best - 1
