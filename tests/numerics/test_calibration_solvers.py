"""Solvers of weights: codes and scales against their definition in float64, and errors against rounding to nearest."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.quant.calibration.gptq import gptq
from lightx2v.quant.calibration.grids import (
    CodebookGrid,
    Grid,
    Groups,
    IntegerGrid,
    dequantize,
    fake_quantize,
    nearest,
)
from lightx2v.quant.calibration.hqq import hqq

E2M1 = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


def to_e4m3(scale: Tensor) -> Tensor:
    return scale.to(torch.float8_e4m3fn).float()


GRIDS: dict[str, Grid] = {
    "int8-channel": IntegerGrid(8, 0),
    "int4-g64": IntegerGrid(4, 64),
    "int4-g64-shrink": IntegerGrid(4, 64, shrink=True),
    "int4-g128-asym": IntegerGrid(4, 128, symmetric=False),
    "int3-g64-asym": IntegerGrid(3, 64, symmetric=False),
    "int2-g32-asym-shrink": IntegerGrid(2, 32, symmetric=False, shrink=True),
    "int3-channel": IntegerGrid(3, 0),
    "table": CodebookGrid(E2M1, 16, to_e4m3),
}


def values_of(groups: Groups, grid: Grid) -> Tensor:
    """The weight in float64, by the definition of codes."""
    n, k = groups.codes.shape
    width = grid.size or k
    assert groups.scale.shape == (n, math.ceil(k / width)) and groups.codes.dtype == torch.uint8
    weight = torch.empty(n, k, dtype=torch.float64)
    for column in range(k):
        codes, scale = groups.codes[:, column], groups.scale[:, column // width].double()
        if isinstance(grid, CodebookGrid):
            weight[:, column] = torch.tensor([grid.values[code] for code in codes.tolist()]).double() * scale
            continue
        assert isinstance(grid, IntegerGrid) and int(codes.max()) < 2**grid.bits
        zero = 2 ** (grid.bits - 1) if groups.zero is None else groups.zero[:, column // width].double()
        assert (groups.zero is None) == grid.symmetric
        weight[:, column] = (codes.double() - zero) * scale
    return weight


def correlated(rows: int, k: int, seed: int = 0) -> Tensor:
    """Inputs most of whose variance lies in few directions, with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.linspace(1, 0.02, k)[:, None]
    x = torch.randn(rows, k, generator=generator) @ mix
    x[:, :: max(1, k // 8)] *= 5
    return x


def weight_of(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    wanted = x.double() @ weight.double().T
    return float((x.double() @ rounded.double().T - wanted).norm() / wanted.norm())


Solve = Callable[[Tensor, Grid], Groups]


def by_gptq(weight: Tensor, grid: Grid, act_order: bool = False) -> Groups:
    x = correlated(64, weight.shape[1])
    return gptq(weight, x.T @ x, grid, act_order=act_order)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("solver", ["nearest", "gptq", "gptq-ordered"])
@settings(max_examples=6, deadline=None)
@given(n=st.sampled_from([1, 5]), k=st.sampled_from([1, 16, 63, 64, 130, 200]), seed=st.integers(0, 99))
def test_codes_and_scales_say_what_the_weight_is(name: str, solver: str, n: int, k: int, seed: int) -> None:
    grid, weight = GRIDS[name], weight_of(n, k, seed)
    groups = nearest(weight, grid) if solver == "nearest" else by_gptq(weight, grid, solver == "gptq-ordered")
    exact = values_of(groups, grid)
    torch.testing.assert_close(dequantize(groups, grid).double(), exact, rtol=1e-5, atol=1e-6)
    # The rounding of no solver is far from the weight: the scales of nearest times a few steps.
    assert float((exact - weight.double()).abs().max()) <= 8 * float(nearest(weight, grid).scale.max())


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 4), k=st.sampled_from([1, 7, 64, 100, 129]), seed=st.integers(0, 99))
def test_nearest_is_nearest(name: str, n: int, k: int, seed: int) -> None:
    """No other code is nearer, with the scales that were chosen."""
    grid, weight = GRIDS[name], weight_of(n, k, seed)
    groups = nearest(weight, grid)
    error = (values_of(groups, grid) - weight.double()).abs()
    count = len(grid.values) if isinstance(grid, CodebookGrid) else 2**grid.bits  # type: ignore[attr-defined]
    for code in range(0, count, max(1, count // 16)):
        others = Groups(torch.full_like(groups.codes, code), groups.scale, groups.zero)
        assert bool((error <= (values_of(others, grid) - weight.double()).abs() + 1e-6).all())


def test_scales_by_their_formulas() -> None:
    weight = torch.tensor([[-3.5, 1.0, 7.0, 0.0, 2.0, 3.0]])
    symmetric, affine = nearest(weight, IntegerGrid(4, 4)), nearest(weight, IntegerGrid(4, 4, symmetric=False))
    torch.testing.assert_close(symmetric.scale, torch.tensor([[1.0, 3 / 7]]))
    torch.testing.assert_close(affine.scale, torch.tensor([[10.5 / 15, 3 / 15]]))  # the last group is filled with zeros
    assert affine.zero is not None
    torch.testing.assert_close(affine.zero, torch.tensor([[3.5 / 0.7, 0.0]]))
    assert symmetric.codes.tolist() == [[4, 9, 15, 8, 13, 15]] and affine.codes.tolist() == [[0, 6, 15, 5, 10, 15]]
    table = nearest(weight, CodebookGrid(E2M1, 6, to_e4m3))
    assert table.scale.tolist() == [[1.125]] and table.codes.tolist() == [[13, 2, 7, 0, 4, 5]]


@pytest.mark.parametrize("name", GRIDS)
def test_weights_of_zeros_stay_zeros(name: str) -> None:
    zeros, grid = torch.zeros(3, 70), GRIDS[name]
    solved = [nearest(zeros, grid), by_gptq(zeros, grid)]
    if isinstance(grid, IntegerGrid) and not grid.symmetric:
        solved.append(hqq(zeros, grid.bits, grid.size))
    for groups in solved:
        assert not dequantize(groups, grid).any()


def test_shrinking_makes_squares_of_errors_smaller() -> None:
    weight = weight_of(16, 256)
    for bits in (4, 3, 2):
        for symmetric in (True, False):
            plain, small = (fake_quantize(weight, IntegerGrid(bits, 64, symmetric, shrink)) for shrink in (False, True))
            assert float((small - weight).norm()) < 0.97 * float((plain - weight).norm())


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "int8-channel"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_better_than_nearest_where_inputs_are_correlated(name: str, act_order: bool) -> None:
    grid, weight, x = GRIDS[name], weight_of(64, 200), correlated(1500, 200)
    seen, unseen = x[:1000], x[1000:]
    groups = gptq(weight, seen.T @ seen, grid, act_order=act_order)
    plain = output_error(weight, fake_quantize(weight, grid), unseen)
    assert output_error(weight, dequantize(groups, grid), unseen) < 0.75 * plain


def test_gptq_without_correlations_rounds_to_nearest() -> None:
    weight, grid = weight_of(8, 130), IntegerGrid(4, 64)
    for act_order in (False, True):
        groups = gptq(weight, torch.eye(130) * 3, grid, act_order=act_order)
        assert all(torch.equal(*pair) for pair in zip(groups[:2], nearest(weight, grid)[:2], strict=True))


def test_gptq_of_blocks_is_gptq_of_columns() -> None:
    """Errors that are passed on later arrive all the same."""
    weight, x, grid = weight_of(16, 200), correlated(400, 200), IntegerGrid(8, 0)
    whole = dequantize(gptq(weight, x.T @ x, grid, block=1000), grid)
    for block in (1, 50, 128):
        part = dequantize(gptq(weight, x.T @ x, grid, block=block), grid)
        assert float((part != whole).float().mean()) < 0.02  # float32 sums in another order round a few the other way
        torch.testing.assert_close(output_error(weight, part, x), output_error(weight, whole, x), rtol=0.05, atol=0)


def test_gptq_by_the_formula_of_the_paper() -> None:
    """Column by column with the inverse of the remaining columns' gram computed anew, in float64."""
    n, k = 6, 24
    weight, x, grid = weight_of(n, k), correlated(100, k), IntegerGrid(4, 0)
    gram = (x.T @ x).double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(k)
    scales = grid.fit(weight)
    left = weight.double()
    for column in range(k):
        inverse = gram[column:, column:].inverse()
        codes = grid.encode(left[:, column : column + 1].float(), scales)
        rounded = grid.decode(codes, scales).double().squeeze(1)
        left[:, column:] -= torch.outer((left[:, column] - rounded) / inverse[0, 0], inverse[0])
        left[:, column] = rounded
    found = dequantize(gptq(weight, (x.T @ x), grid), grid)
    torch.testing.assert_close(found.double(), left, rtol=1e-5, atol=1e-6)


def test_gptq_with_channels_that_were_always_zero_or_equal() -> None:
    weight, x, grid = weight_of(8, 96), correlated(300, 96), IntegerGrid(4, 32)
    x[:, 10:20] = 0
    x[:, 40] = x[:, 41]
    for act_order in (False, True):
        for damp in (0.01, 0.0):
            groups = gptq(weight, x.T @ x, grid, damp=damp, act_order=act_order)
            assert output_error(weight, dequantize(groups, grid), x) < 0.1
    few = correlated(3, 96)  # fewer rows than channels
    assert output_error(weight, dequantize(gptq(weight, few.T @ few, grid), grid), few) < 0.1
    nothing = gptq(weight, torch.zeros(96, 96), grid)
    assert torch.equal(nothing.codes, nearest(weight, grid).codes)


def test_gptq_refuses_what_is_not_a_number() -> None:
    gram = torch.eye(8)
    gram[2, 3] = torch.nan
    with pytest.raises(LightX2VError, match="inf or NaN"):
        gptq(weight_of(2, 8), gram, IntegerGrid(4, 8))


def lp_error(weight: Tensor, rounded: Tensor, p: float = 0.7) -> float:
    return float((weight.double() - rounded.double()).abs().pow(p).mean())


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 6),
    k=st.sampled_from([1, 8, 64, 100, 256]),
    size=st.sampled_from([0, 32, 64]),
    seed=st.integers(0, 99),
)
def test_hqq_is_never_worse_than_nearest(bits: int, n: int, k: int, size: int, seed: int) -> None:
    grid, weight = IntegerGrid(bits, size, symmetric=False), weight_of(n, k, seed) ** 3
    groups, plain = hqq(weight, bits, size), nearest(weight, grid)
    assert torch.equal(groups.scale, plain.scale)
    if k % (size or k) == 0:  # else the zeros that fill the last group count as well
        assert lp_error(weight, values_of(groups, grid)) <= lp_error(weight, values_of(plain, grid)) * (1 + 1e-5)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hqq_is_better_on_heavy_tails(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator) * torch.rand(64, 512, generator=generator).pow(-0.4)
    grid = IntegerGrid(bits, 64, symmetric=False)
    found, plain = dequantize(hqq(weight, bits, 64), grid), fake_quantize(weight, grid)
    assert lp_error(weight, found) < 0.98 * lp_error(weight, plain)
    assert float((weight - found).norm()) < 0.99 * float((weight - plain).norm())


def test_hqq_by_its_formula() -> None:
    """One group, step by step in float64."""
    weight = (weight_of(1, 64, 5) ** 3).double()
    scale, first = (
        tensor.double() for tensor in IntegerGrid(3, 64, symmetric=False).fit(weight.float()) if tensor is not None
    )
    zero, beta, tried = first, 10.0, []
    for _ in range(21):
        codes = (weight / scale + zero).round().clamp(0, 7)
        error = weight - (codes - zero) * scale
        tried.append((float(error.abs().pow(0.7).mean()), float(zero)))
        shrunk = error.sign() * (error.abs() - error.abs().pow(-0.3) / beta).clamp(min=0)
        zero, beta = (codes - (weight - shrunk) / scale).mean(dim=1, keepdim=True), beta * 1.01
    found = hqq(weight.float(), 3, 64).zero
    assert found is not None and float(found) == pytest.approx(min(tried)[1], rel=1e-4) and min(tried)[0] < tried[0][0]
