"""Attention on quantized Q, K and V as msModelSlim has it, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightx2v.attention.base import ATTENTION, AttentionFn
from lightx2v.attention.fa3 import prepared
from lightx2v.attention.scales import HeadScales, scale_tensors
from lightx2v.errors import LightX2VError
from lightx2v.quant.calibration.ranges import recall_scale
from lightx2v.quant.hadamard import rotation_size
from tests.numerics.attention_definition import exact
from tests.numerics.test_attention_quantized import channel_outliers, normal

#: Largest error, as a share of the result's length, for normal q, k and v. mxfp4 has one bit of mantissa.
KINDS = {"fa3_int8_ref": 0.05, "fa3_fp8_ref": 0.08, "fa3_mxfp4_ref": 0.3}
ENDINGS = ("", "_unsmoothed", "_rotated", "_rotated_unsmoothed")
BOUNDS = {f"{kind}{ending}": bound for kind, bound in KINDS.items() for ending in ENDINGS}
STATIC = ATTENTION["fa3_int8_static_ref"]


class Module(nn.Module):
    """What holds an attention, and its scales."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rotated: bool, smoothed: bool) -> None:
        super().__init__()
        size = rotation_size(q.shape[-1]) if rotated else 0
        seen = (*prepared(q, k, size, smoothed), v)
        ends = (x.transpose(0, 2).flatten(1).aminmax(dim=1) for x in seen)
        scales = {leaf: recall_scale(*window) for leaf, window in zip("qkv", ends, strict=True)}
        self.attn_scales = HeadScales(q.shape[2], q.shape[3], "here")
        for leaf, tensor in scale_tensors(scales, size, smoothed).items():
            self.attn_scales.load_tensor(leaf, tensor)
        self.attn_scales.finish()

    @property
    def function(self) -> AttentionFn:
        assert STATIC.for_module is not None
        return STATIC.for_module(self, "attention")


def distance(got: Tensor, wanted: Tensor) -> float:
    assert bool(got.isfinite().all())
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def test_every_backend_has_a_bound() -> None:
    assert {name for name in ATTENTION if name.startswith("fa3")} == {*BOUNDS, "fa3_int8_static_ref"}
    assert not any(ATTENTION[name].exact for name in (*BOUNDS, "fa3_int8_static_ref"))


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.sampled_from([1, 2, 129]),
    keys=st.sampled_from([1, 3, 64, 65, 257]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([32, 64, 72, 96, 128]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@pytest.mark.parametrize("name", BOUNDS)
def test_any_shape(
    name: str, batch: int, queries: int, keys: int, heads: int, dim: int, seed: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in normal(batch, queries, keys, heads, dim, seed))
    got = ATTENTION[name].fn(q, k, v)
    assert got.shape == q.shape and got.dtype == dtype
    assert distance(got, exact(q, k, v)) <= BOUNDS[name] + (0.01 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("smoothed", [False, True])
def test_static_scales_of_the_data_are_as_good_as_those_found_at_the_call(rotated: bool, smoothed: bool) -> None:
    q, k, v = normal(1, 130, 200, 3, 96)
    wanted = exact(q, k, v)
    dynamic = f"fa3_int8_ref{'_rotated' if rotated else ''}{'' if smoothed else '_unsmoothed'}"
    static = Module(q, k, v, rotated, smoothed).function(q, k, v)
    assert abs(distance(static, wanted) - distance(ATTENTION[dynamic].fn(q, k, v), wanted)) < 0.002
    torch.testing.assert_close(static, ATTENTION[dynamic].fn(q, k, v), atol=2e-3, rtol=2e-3)


def test_static_scales_cut_off_what_lies_beyond() -> None:
    q, k, v = normal(1, 50, 60, 2, 32)
    function = Module(q, k, v, False, False).function
    large = v.clone()
    large[:, 7, 1] *= 1000
    got, plain = function(q, k, large), function(q, k, v)
    assert torch.equal(got[:, :, 0], plain[:, :, 0])  # another head
    reach = v[:, :, 1].abs().max() * 1.01
    assert float(got[:, :, 1].abs().max()) <= reach
    assert float(exact(q, k, large)[:, :, 1].abs().max()) > 10 * reach


@pytest.mark.parametrize("name", KINDS)
def test_smoothing_takes_any_offset_of_the_keys_and_without_it_the_result_is_lost(name: str) -> None:
    q, k, v = channel_outliers(150.0)
    wanted = exact(q, k, v)
    for rotated in ("", "_rotated"):
        smoothed = distance(ATTENTION[f"{name}{rotated}"].fn(q, k, v), wanted)
        unsmoothed = distance(ATTENTION[f"{name}{rotated}_unsmoothed"].fn(q, k, v), wanted)
        assert smoothed <= BOUNDS[name] and unsmoothed > 2 * smoothed


@pytest.mark.parametrize("name", ["fa3_int8_ref_unsmoothed", "fa3_int8_ref"])
def test_rotation_spreads_a_channel_that_stands_out(name: str) -> None:
    """By the same for no two tokens, so that smoothing does not help."""
    q, k, v = normal(2, 100, 200, 2, 64)
    k[..., 5] *= 60
    wanted = exact(q, k, v)
    rotated = name.replace("_ref", "_ref_rotated")
    assert distance(ATTENTION[rotated].fn(q, k, v), wanted) < 0.5 * distance(ATTENTION[name].fn(q, k, v), wanted)


@pytest.mark.parametrize("dim", [64, 72, 128])
def test_what_is_done_to_queries_and_keys_leaves_attention_as_it_is(dim: int) -> None:
    q, k, v = normal(1, 40, 50, 2, dim)
    for size in (0, rotation_size(dim)):
        prepared_q, prepared_k = prepared(q, k, size, True)
        assert distance(exact(prepared_q, prepared_k, v), exact(q, k, v)) < 1e-5
        assert torch.equal(prepared_q, q) is (size == 0)


def test_rows_of_zeros_stay_finite() -> None:
    q, k, v = normal(1, 200, 130, 2, 64)
    zero = torch.zeros_like
    for name in KINDS:
        assert distance(ATTENTION[name].fn(zero(q), k, v), exact(zero(q), k, v)) <= BOUNDS[name]
        assert not ATTENTION[name].fn(q, k, zero(v)).any()


def test_masks_of_keys_leave_the_keys_out() -> None:
    q, k, v = normal(2, 20, 30, 2, 32)
    mask = torch.ones(2, 1, 1, 30, dtype=torch.bool)
    mask[1, ..., 11:] = False
    for function in (Module(q, k, v, True, True).function, ATTENTION["fa3_int8_ref_rotated"].fn):
        got = function(q, k, v, mask=mask)
        assert distance(got, exact(q, k, v, mask=mask)) < BOUNDS["fa3_int8_ref"]


def test_a_static_backend_does_not_run_without_scales() -> None:
    q, k, v = normal(1, 4, 5, 1, 32)
    with pytest.raises(LightX2VError, match="calibrate first"):
        STATIC.fn(q, k, v)
    assert STATIC.for_module is not None
    with pytest.raises(LightX2VError, match="calibrate first"):
        STATIC.for_module(nn.Module(), "attention")
