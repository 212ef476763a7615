"""What the tests of kernels rest on: the interpreter rounds as a GPU does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor

from lightx2v.kernels.interpreter import convert

KINDS = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def every_value(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a format, in order, as float64."""
    bits = torch.arange(256 if dtype.itemsize == 1 else 65536)
    values = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype).double()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("target", KINDS, ids=str)
def test_conversions_round_to_the_nearest_and_ties_to_even(target: tl.dtype) -> None:
    grid = every_value(KINDS[target])
    low, high = grid[:-1], grid[1:]
    middle = (low + high) / 2
    fits = (middle.float().double() == middle) & (middle.abs() > 2.0**-126)
    middle, low, high = middle[fits], low[fits], high[fits]
    for values, wanted in (
        (middle, None),
        (torch.nextafter(middle.float(), torch.tensor(-torch.inf)).double(), low),
        (torch.nextafter(middle.float(), torch.tensor(torch.inf)).double(), high),
    ):
        bits = convert(values.float().numpy(), tl.float32, target)
        got = torch.from_numpy(bits.copy()).view(KINDS[target]).double()
        if wanted is None:  # a tie: one of the neighbours, with an even last bit
            assert bool(((got == low) | (got == high)).all()) and not np.any(bits & 1)
        else:
            assert torch.equal(got, wanted)


def test_e4m3_saturates_and_keeps_nan() -> None:
    values = np.array([1e9, -np.inf, 448.0, 464.0, np.nan], dtype=np.float32)
    got = torch.from_numpy(convert(values, tl.float32, tl.float8e4nv).copy()).view(torch.float8_e4m3fn).float()
    assert got[:4].tolist() == [448.0, -448.0, 448.0, 448.0] and bool(got[4].isnan())
