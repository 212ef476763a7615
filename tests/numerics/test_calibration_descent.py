"""Coordinate descent after GPTQ: its error against all other codes, and against the start's, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.quant.calibration.descent import descend
from lightx2v.quant.calibration.gptq import gptq
from lightx2v.quant.calibration.grids import Groups, IntegerGrid, nearest


def gram_of(k: int, seed: int = 0) -> Tensor:
    """Of inputs most of whose variance lies in few directions; positive definite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=generator) @ (torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k))
    gram = x.T @ x / len(x)
    return gram + 1e-3 * gram.diagonal().mean() * torch.eye(k)


def errors(weight: Tensor, gram: Tensor, groups: Groups, width: int) -> Tensor:
    """tr((W - Q) H (W - Q)^T) by rows, of the definition of codes."""
    assert groups.zero is not None
    group_of = torch.arange(weight.shape[1]) // width
    values = (groups.codes.double() - groups.zero.double()[:, group_of]) * groups.scale.double()[:, group_of]
    off = values - weight.double()
    return torch.einsum("nk,kl,nl->n", off, gram.double(), off)


@pytest.mark.parametrize(("bits", "size", "k"), [(4, 64, 128), (2, 64, 128), (3, 48, 112), (2, 0, 40)])
def test_no_row_gets_worse_and_most_get_better(bits: int, size: int, k: int) -> None:
    weight = torch.randn(24, k, generator=torch.Generator().manual_seed(1))
    gram, grid = gram_of(k), IntegerGrid(bits, size, symmetric=False, shrink=True)
    for start in (nearest(weight, grid), gptq(weight, gram, grid, act_order=True)):
        before = errors(weight, gram, start, size or k)
        found = descend(weight, gram, start, grid)
        after = errors(weight, gram, found, size or k)
        assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**bits
        assert bool((after <= before * (1 + 1e-4)).all())
        assert float(after.sum()) < 0.95 * float(before.sum())


def test_no_single_code_can_be_bettered() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    gram, grid = gram_of(8), IntegerGrid(2, 0, symmetric=False)
    found = descend(weight, gram, nearest(weight, grid), grid, rounds=40)
    least = errors(weight, gram, found, 8)
    for column, code in itertools.product(range(8), range(4)):
        codes = found.codes.clone()
        codes[:, column] = code
        assert bool((errors(weight, gram, found._replace(codes=codes), 8) >= least * (1 - 1e-5)).all())


def test_scales_are_those_of_least_squares() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    gram, grid = gram_of(12), IntegerGrid(2, 6, symmetric=False)
    found = descend(weight, gram, nearest(weight, grid), grid, rounds=60)
    assert found.zero is not None
    root = torch.linalg.cholesky(gram.double()).T  # R^T R = H
    for row in range(5):
        codes = found.codes[row].double()
        columns = [
            torch.where(torch.arange(12) // 6 == group, part, 0.0)
            for part in (codes, torch.ones(12))
            for group in (0, 1)
        ]
        basis = root @ torch.stack([column.double() for column in columns], dim=1)
        best = basis @ torch.linalg.pinv(basis) @ (root @ weight[row].double()) - root @ weight[row].double()
        assert float(errors(weight, gram, found, 6)[row]) == pytest.approx(float(best.square().sum()), rel=1e-3)


def test_a_grid_without_zero_points_is_refused() -> None:
    weight, grid = torch.randn(4, 16), IntegerGrid(4, 0)
    with pytest.raises(LightX2VError, match="zero points"):
        descend(weight, gram_of(16), nearest(weight, grid), grid)
