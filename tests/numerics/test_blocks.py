"""MX, nvfp4 and int4 codes and scales, against formulas written independently in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightx2v.quant.blocks import global_scale, mx_blocks, nvfp4_blocks, unpack_elements
from lightx2v.quant.integers import integer_leaves
from lightx2v.quant.minifloat import E2M1, E3M2, Minifloat, lookup_pairs
from lightx2v.quant.spec import INT4_G128, MXFP4, MXFP6, MXFP8, NVFP4, QSpec
from tests.numerics.definitions import E2M1 as E2M1_VALUES
from tests.numerics.definitions import E3M2 as E3M2_VALUES
from tests.numerics.definitions import small_float

E4M3_VALUES = np.array([small_float(code, 4, 3) for code in range(127)])  # 0x7F is NaN
TABLES = {"mxfp8": E4M3_VALUES, "mxfp6": E3M2_VALUES[:32], "mxfp4": E2M1_VALUES[:8], "nvfp4": E2M1_VALUES[:8]}
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The number of an ascending table that is nearest to each magnitude; of two, the one of the even code."""
    size = np.minimum(np.abs(values), table[-1])
    above = np.searchsorted(table, size).clip(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    middle = (low + high) / 2
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


def rceil_exponent(amax: float, largest: float) -> int:
    """torchao's RCEIL, biased: ceil(log2(amax / largest)), in exact arithmetic."""
    if amax == 0:
        return 0
    fraction, power = math.frexp(amax / largest)
    return max((power - 1 if fraction == 0.5 else power) + 127, 0)


def sample(rows: int, columns: int, spread: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values over many binades, with zeros and exact powers of two and ties among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= 2 ** (spread * torch.randn(rows, columns, generator=generator))
    x[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    grid = torch.randint(-8, 9, (rows, columns), generator=generator) * 0.25
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.3, grid, x).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("kind", [E2M1, E3M2], ids=["e2m1", "e3m2"])
def test_small_floats(kind: Minifloat) -> None:
    table = E2M1_VALUES if kind is E2M1 else E3M2_VALUES
    assert kind.values() == table.tolist() and kind.largest == table.max()
    codes = torch.arange(kind.codes, dtype=torch.uint8)
    assert torch.equal(kind.encode(torch.from_numpy(table).float()), codes)
    pairs = torch.cartesian_prod(codes, codes).long()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        both = lookup_pairs((pairs[:, 0] + kind.codes * pairs[:, 1]).unsqueeze(1), tuple(kind.values()), dtype)
        assert both.dtype == dtype and np.array_equal(both.float().numpy(), table[pairs.numpy()])
    positive = table[: kind.codes // 2]
    ties = (positive[1:] + positive[:-1]) / 2
    x = np.concatenate([np.linspace(-40, 40, 4001), ties, -ties, np.nextafter(ties, 9), np.nextafter(ties, 0), [1e-30]])
    x32 = torch.from_numpy(x.astype(np.float32))
    assert np.array_equal(kind.round(x32).numpy(), nearest(x32.double().numpy(), positive).astype(np.float32))
    assert kind.round(torch.tensor(float("nan"))).isnan()


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from([MXFP8, MXFP6, MXFP4]),
    rows=st.integers(1, 6),
    columns=st.integers(1, 130),
    spread=st.sampled_from([0.0, 2.0, 10.0]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_mx(spec: QSpec, rows: int, columns: int, spread: float, dtype: torch.dtype, seed: int) -> None:
    x = sample(rows, columns, spread, dtype, seed)
    elements, scale = mx_blocks(x, spec)
    groups = -(-columns // 32)
    assert elements.shape == (rows, groups * 32) and scale.shape == (rows, groups)
    assert scale.dtype == torch.float8_e8m0fnu
    table = TABLES[spec.dtype]
    exact = np.zeros((rows, groups * 32))
    exact[:, :columns] = x.double().numpy()
    blocks = exact.reshape(rows, groups, 32)
    exponents = np.vectorize(lambda amax: rceil_exponent(amax, table[-1]))(np.abs(blocks).max(axis=2))
    assert np.array_equal(scale.view(torch.uint8).numpy(), exponents)
    wanted = nearest(blocks / 2.0 ** (exponents[..., None] - 127), table)
    assert np.array_equal(elements.double().numpy(), wanted.reshape(rows, -1))
    packed, again = mx_blocks(x, spec, packed=True)
    assert torch.equal(again.view(torch.uint8), scale.view(torch.uint8))
    assert packed.shape == (rows, groups * {"mxfp8": 32, "mxfp6": 24, "mxfp4": 16}[spec.dtype])
    assert torch.equal(unpack_elements(packed, spec), elements.float())


@pytest.mark.parametrize("spec", [MXFP8, MXFP6, MXFP4], ids=lambda spec: spec.dtype)
def test_mx_at_the_edges(spec: QSpec) -> None:
    largest = TABLES[spec.dtype][-1]
    for power in (-40, -1, 0, 1, 40):
        for amax, more in ((largest, 0), (np.nextafter(np.float32(largest), np.float32(1e9)), 1)):
            x = torch.zeros(1, 32)
            x[0, 3] = float(amax) * 2.0**power
            assert mx_blocks(x, spec).scale.view(torch.uint8).item() == 127 + power + more
    assert mx_blocks(torch.full((1, 32), 1e-45), spec).scale.view(torch.uint8).item() == 0
    assert mx_blocks(torch.full((1, 32), 3.4e38), spec).elements.float().isfinite().all()
    for fault in (float("inf"), float("nan")):
        x = torch.ones(2, 64)
        x[0, 40] = fault
        scale = mx_blocks(x, spec).scale.float()
        assert scale.isnan().tolist() == [[False, True], [False, False]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 70),
    spread=st.sampled_from([0.0, 2.0, 8.0]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_nvfp4(rows: int, columns: int, spread: float, dtype: torch.dtype, seed: int) -> None:
    x = sample(rows, columns, spread, dtype, seed)
    tensor_scale = global_scale(x.abs().amax())
    elements, scale = nvfp4_blocks(x, NVFP4, tensor_scale)
    assert scale.dtype == torch.float8_e4m3fn and scale.shape == (rows, -(-columns // 16))
    amax = x.abs().max().double().item()
    assert tensor_scale.item() == pytest.approx(2688 / amax if amax else 1.0, rel=1e-6)
    exact = np.zeros((rows, scale.shape[1] * 16))
    exact[:, :columns] = x.double().numpy()
    blocks = exact.reshape(rows, -1, 16)
    wanted = np.abs(blocks).max(axis=2) / 6 * tensor_scale.double().item()
    stored = scale.double().numpy()
    # Rounded to the nearest e4m3; float32 may fall on the other side of a tie.
    assert (np.abs(stored - wanted) <= np.abs(nearest(wanted, E4M3_VALUES) - wanted) + wanted * 1e-6).all()
    factor = np.where(stored == 0, 0, tensor_scale.double().item() / np.where(stored == 0, 1, stored))[..., None]
    scaled, got = blocks * factor, elements.double().numpy().reshape(blocks.shape)
    assert (np.abs(got - scaled) <= np.abs(nearest(scaled, TABLES["nvfp4"]) - scaled) + np.abs(scaled) * 1e-6).all()
    assert np.isin(np.abs(got), TABLES["nvfp4"]).all()
    packed = nvfp4_blocks(x, NVFP4, tensor_scale, packed=True).elements
    assert torch.equal(unpack_elements(packed, NVFP4), elements.float())


def test_the_largest_value_takes_the_largest_code_and_scale() -> None:
    x = torch.randn(4, 64)
    x[2, 17] = -9.0
    elements, scale = nvfp4_blocks(x, NVFP4, global_scale(x.abs().amax()))
    assert scale[2, 1] == 448 and elements[2, 17] == -6
    assert global_scale(torch.tensor(0.0)) == 1 and global_scale(torch.tensor(1e-38)).isfinite()
    x[0, 0] = float("inf")
    assert nvfp4_blocks(x, NVFP4, torch.tensor(100.0)).scale.float().isnan().tolist()[0] == [True, False, False, False]


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), dtype=DTYPES, seed=st.integers(0, 99))
def test_int4(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    weight = sample(rows, columns, 1.0, dtype, seed)
    packed, scale = integer_leaves(weight, INT4_G128).values()
    groups = -(-columns // 128)
    assert packed.shape == (rows, groups * 64) and scale.shape == (rows, groups)
    exact = np.zeros((rows, groups * 128))
    exact[:, :columns] = weight.double().numpy()
    amax = np.maximum(np.abs(exact.reshape(rows, groups, 128)).max(axis=2), 1e-5)
    assert np.allclose(scale.numpy(), amax / 7, rtol=1e-6)
    values = unpack_elements(packed, INT4_G128).double().numpy()
    each = scale.double().numpy().repeat(128, axis=1)
    assert (np.abs(values * each - exact) <= each * 0.5 * (1 + 1e-5)).all()
    assert np.abs(values).max() <= 7
