"""What is kept between steps: its dtype, its size, and the Taylor series over it."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState

from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.series import Series, added, residual
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import Stream


def store(dtype: torch.dtype = torch.float32, kind: str = "compute") -> tuple[Store, CacheReport]:
    report = CacheReport("test")
    return Store(Holding(dtype, kind), report), report  # type: ignore[arg-type]


def test_what_is_kept_comes_back_in_its_shape_and_dtype() -> None:
    kept, report = store(torch.bfloat16)
    wide, narrow = torch.randn(2, 5, 8), torch.randn(2, 5, 8).to(torch.bfloat16)
    kept.put("a", (wide, None, narrow))
    x, nothing, y = kept.get("a")
    assert nothing is None and torch.equal(y, narrow) and x.dtype == torch.float32
    assert torch.equal(x, wide.to(torch.bfloat16).float())
    assert report.kept_bytes == 2 * 80 * 2 and report.saved_bytes == 0
    assert "a" in kept and "b" not in kept


def test_fp8_keeps_a_byte_a_value_and_a_scale_a_token() -> None:
    kept, report = store(torch.bfloat16, "fp8")
    value = torch.randn(2, 50, 64) * torch.logspace(-3, 3, 50)[None, :, None]
    kept.put("a", value)
    back = kept.get("a")
    assert report.kept_bytes == 2 * 50 * 64 + 4 * 2 * 50
    assert report.saved_bytes == 2 * 2 * 50 * 64 - report.kept_bytes
    amax = value.abs().amax(dim=-1, keepdim=True)
    assert ((back - value).abs() <= value.abs() / 16 + amax / 448 / 512).all()  # half a step of e4m3


def test_measured_values_are_not_kept_in_fp8() -> None:
    kept, report = store(torch.float32, "fp8")
    value = torch.randn(1, 4, 8)
    kept.put("a", value, measured=True)
    assert torch.equal(kept.get("a"), value) and report.saved_bytes == 0


def test_the_most_that_was_kept_at_once_is_reported() -> None:
    kept, report = store()
    kept.put("a", torch.zeros(1, 10))
    kept.put("b", torch.zeros(1, 10))
    kept.put("a", torch.zeros(1, 5))
    kept.put("b", torch.zeros(1, 5))
    assert report.kept_bytes == 80


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_series_is_the_published_one(order: int) -> None:
    """Against diffusers' state of the same method, over steps that are not evenly spaced."""
    theirs = TaylorSeerState(torch.float32, order)
    kept, _ = store()
    ours = Series(kept, "cond", order)
    assert ours.empty
    values = torch.randn(20, 1, 3, 4).cumsum(dim=0)
    for step in range(20):
        theirs.current_step = step
        if step in (0, 1, 4, 6, 11, 12, 17):
            theirs.update((values[step],))
            ours.update(step, (values[step], None))
        else:
            torch.testing.assert_close(ours.at(step)[0], theirs.predict()[0], rtol=1e-5, atol=1e-5)
    assert ours.at(19)[1] is None


def test_a_line_is_continued_exactly() -> None:
    kept, _ = store()
    series = Series(kept, "uncond", 1)
    for step in (0, 3):
        series.update(step, (torch.full((1, 2, 4), 1.0 + step), torch.full((1, 1, 4), -2.0 * step)))
    x, txt = series.at(7)
    assert (
        txt is not None
        and torch.equal(x, torch.full((1, 2, 4), 8.0))
        and torch.equal(txt, torch.full((1, 1, 4), -14.0))
    )


def test_streams_gain_what_they_lost() -> None:
    before, after = Stream(torch.ones(1, 2, 4), torch.zeros(1, 3, 4)), Stream(torch.zeros(1, 2, 4), torch.ones(1, 3, 4))
    again = added(before, residual(after, before))
    assert torch.equal(again.x, after.x) and again.txt is not None and torch.equal(again.txt, torch.ones(1, 3, 4))
    assert added(Stream(before.x), residual(Stream(after.x), Stream(before.x))).txt is None


def test_the_report_counts_and_says_it() -> None:
    report = CacheReport("fora")
    for computed in (True, False, False):
        report.count("cond", computed)
    report.count_part("self", True)
    report.count_part("self", False)
    assert (report.forwards, report.computed_forwards) == (3, 1)
    assert report.to_json()["parts"] == {"self": {"computed": 1, "recalled": 1}}
    assert report.line() == "fora: computed 1 of 3 cond; kept 0.0 MiB"
