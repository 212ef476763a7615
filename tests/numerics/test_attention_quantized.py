"""8-bit attention in plain torch, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.attention.base import ATTENTION
from lightx2v.attention.quantized import FP8_MAX, heads_to_fp8, rounded, smooth
from tests.numerics.attention_definition import exact

#: Largest error, as a share of the result's length, for normal q, k and v. P and V in e4m3 round by up to 1/16 each
#: (2.5 % of a value's size at the root mean square), in float16 by nothing that shows beside int8 scores.
BOUNDS = {
    "sage_ref_int8_fp16": 0.03,
    "sage_ref_int8_fp8": 0.06,
    "sage_ref_int8_fp8_unsmoothed": 0.06,
    "fp8_block_ref": 0.08,
    "fp8_block_ref_unsmoothed": 0.08,
    "fp8_ref": 0.08,
    "fp8_ref_unsmoothed": 0.08,
}
SMOOTHED = [name for name in BOUNDS if not name.endswith("_unsmoothed")]


def normal(batch: int, queries: int, keys: int, heads: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, heads, dim) for tokens in (queries, keys, keys))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def error(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> float:
    got, wanted = ATTENTION[name].fn(q, k, v, scale=scale), exact(q, k, v, scale)
    assert got.shape == q.shape and got.dtype == q.dtype and bool(got.isfinite().all())
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def test_every_reference_has_a_bound() -> None:
    assert set(BOUNDS) == {name for name in ATTENTION if "_ref" in name and not name.startswith("fa3")}
    assert not any(ATTENTION[name].exact for name in BOUNDS)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.sampled_from([1, 2, 127, 128, 129, 300]),
    keys=st.sampled_from([1, 3, 63, 64, 65, 200, 257]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([32, 64, 72, 128]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@pytest.mark.parametrize("name", BOUNDS)
def test_any_shape(
    name: str, batch: int, queries: int, keys: int, heads: int, dim: int, seed: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in normal(batch, queries, keys, heads, dim, seed))
    assert error(name, q, k, v) <= BOUNDS[name] + (0.01 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_flat_and_peaked_scores(name: str, scale: float) -> None:
    """A peaked softmax takes one value, whose code is off by half a step at most; the errors of scores grow with it."""
    assert error(name, *normal(1, 150, 300, 2, 64), scale=scale) <= BOUNDS[name] * (1 if scale < 0.1 else 3)


@pytest.mark.parametrize("name", BOUNDS)
def test_rows_of_zeros_stay_finite(name: str) -> None:
    q, k, v = normal(1, 200, 130, 2, 64)
    zero = torch.zeros_like
    assert error(name, zero(q), k, v) <= BOUNDS[name]  # the mean of the values
    assert error(name, q, zero(k), v) <= BOUNDS[name]
    assert not ATTENTION[name].fn(q, k, zero(v)).any()
    q[:, 128:], k[:, 64:128], v[:, :64] = 0, 0, 0  # whole blocks
    assert error(name, q, k, v) <= BOUNDS[name]


@pytest.mark.parametrize("name", BOUNDS)
def test_sizes_that_float16_and_e4m3_do_not_reach(name: str) -> None:
    q, k, v = normal(1, 64, 100, 1, 64)
    small = (q * 1e-12, k * 1e12, v * 1e-20 if "fp16" not in name else v)
    assert error(name, *small) <= BOUNDS[name]


def channel_outliers(size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keys as large models have them: some channels far from zero, by the same for all tokens (arXiv 2410.02367)."""
    q, k, v = normal(2, 200, 500, 2, 128)
    k[..., ::16] += size
    return q, k, v


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_keys_may_have_any_offset(name: str) -> None:
    plain, shifted = (error(name, *channel_outliers(size)) for size in (0.0, 150.0))
    assert shifted <= BOUNDS[name] and abs(shifted - plain) <= 0.01


@pytest.mark.parametrize("name", [name for name in BOUNDS if name.endswith("_unsmoothed")])
def test_without_smoothing_offsets_destroy_the_result(name: str) -> None:
    outliers = channel_outliers(150.0)
    unsmoothed, smoothed = error(name, *outliers), error(name.removesuffix("_unsmoothed"), *outliers)
    assert unsmoothed > 0.3 and unsmoothed > 4 * smoothed


def test_blocks_confine_a_large_token_where_a_scale_per_head_does_not() -> None:
    q, k, v = normal(1, 256, 512, 1, 64)
    q[:, 3] *= 3e4  # the other rows sink below e4m3's range when they share its scale
    rest = slice(128, None)
    wanted = exact(q, k, v)[:, rest]
    errors = [
        float((ATTENTION[name].fn(q, k, v)[:, rest].double() - wanted).norm() / wanted.norm())
        for name in ("fp8_block_ref", "fp8_ref")
    ]
    assert errors[0] <= BOUNDS["fp8_block_ref"] < errors[1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_use_the_whole_range_and_come_back(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-20], [1.0], [1e20]])
    codes, scale = rounded(x, dtype, x.abs().amax(1, keepdim=True))
    assert codes.dtype == dtype and scale.dtype == torch.float32
    most = 127 if dtype == torch.int8 else FP8_MAX
    assert codes.float().abs().amax(1).tolist() == [most] * 3
    back, step = codes.double() * scale.double(), 0.5 * scale.double()
    allowed = step if dtype == torch.int8 else x.double().abs() / 16 + step / 256
    assert bool(((back - x.double()).abs() <= allowed * 1.001).all())
    codes, scale = rounded(torch.zeros(2, 4), dtype, torch.zeros(2, 1))
    assert not codes.float().any() and not scale.any()


def test_a_scale_per_head_and_keys_without_their_mean() -> None:
    _, k, _ = normal(2, 1, 50, 3, 16)
    codes, scale = heads_to_fp8(k)
    assert codes.shape == k.shape and scale.shape == (2, 3)
    torch.testing.assert_close(scale, k.abs().amax(dim=(1, 3)) / 448)
    assert float(smooth(k).mean(1).abs().max()) < 1e-6 and smooth(k.half()).dtype == torch.float16
