"""Streamed statistics against the same of all data at once, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.quant.calibration.histogram import Histogram
from lightx2v.quant.calibration.observers import InputStatistics, RowSample


def inputs(rows: int, channels: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(channels, generator=generator) * 4
    return (torch.randn(rows, channels, generator=generator) * sizes).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    channels=st.sampled_from([1, 3, 17, 64]),
    batch=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_statistics_of_batches_are_those_of_all(
    rows: int, channels: int, batch: int, seed: int, dtype: torch.dtype
) -> None:
    x = inputs(rows, channels, seed, dtype)
    seen = InputStatistics(channels, gram=True, rows=5, bins=64)
    for part in x.split(batch):
        seen.update(part.unsqueeze(0))
    exact = x.double()
    assert seen.count == rows and seen.low == exact.min() and seen.high == exact.max()
    assert torch.equal(seen.absmax.double(), exact.abs().amax(0))
    torch.testing.assert_close(seen.mean_abs.double(), exact.abs().mean(0), rtol=1e-6, atol=0)
    assert seen.gram is not None and seen.sample is not None and seen.histogram is not None
    torch.testing.assert_close(seen.gram.double(), exact.T @ exact, rtol=1e-4, atol=1e-4 * float(exact.square().sum()))
    assert int(seen.histogram.total) == rows * channels
    assert len(seen.sample.rows) == min(5, rows) and seen.sample.rows.dtype == dtype
    assert all(any(torch.equal(row, other) for other in x) for row in seen.sample.rows)


def counted(values: Tensor, edges: Tensor) -> list[int]:
    """How many values lie in each bin, the left edge with it."""
    return [int(((values >= low) & (values < high)).sum()) for low, high in pairwise(edges)]


@settings(max_examples=25, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 20), min_size=1, max_size=5),
    channels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_histogram_counts_exactly_whatever_the_order(exponents: list[int], channels: int, seed: int) -> None:
    batches = [inputs(40, channels, seed + i).T * 2.0**exponent for i, exponent in enumerate(exponents)]
    forward, backward, merged = Histogram(channels, 16), Histogram(channels, 16), Histogram(channels, 16)
    for batch in batches:
        forward.update(batch)
        part = Histogram(channels, 16)
        part.update(batch)
        merged.merge(part)
    for batch in reversed(batches):
        backward.update(batch)
    values = torch.cat(batches, dim=1)
    for row in range(channels):
        assert forward.counts[row].tolist() == counted(values[row].double(), forward.edges[row])
        absmax = float(values[row].abs().max())
        assert absmax < float(forward.limit[row]) <= max(2 * absmax, 2.0**-24)
    assert torch.equal(forward.low, values.amin(1)) and torch.equal(forward.high, values.amax(1))
    for other in (backward, merged):
        assert all(torch.equal(tensor, other.state()[name]) for name, tensor in forward.state().items())


def test_histogram_of_a_part_of_the_values_knows_the_extremes() -> None:
    x = inputs(1000, 8)
    x[501, 3] = 1000.0
    seen = InputStatistics(8, histogram_values=100)
    seen.update(x)
    assert seen.histogram is not None
    assert 80 <= int(seen.histogram.total) <= 200 and float(seen.histogram.high) == 1000.0
    assert float(seen.histogram.limit) == 1024.0


def test_a_sample_is_uniform_over_batches_and_merges() -> None:
    """Each of 60 rows, in batches of unlike sizes, stays about as often as any other."""
    kept = torch.zeros(60)
    x = torch.arange(60.0)[:, None]
    for seed in range(400):
        first, second = RowSample(20, seed), RowSample(20, 1000 + seed)
        for part in x[:40].split([3, 30, 7]):
            first.update(part)
        second.update(x[40:])
        first.merge(second)
        assert first.seen == 60 and len(first.rows) == 20
        kept[first.rows.flatten().long()] += 1
    # 400 draws with chance 1/3: mean 133, standard deviation 9.4.
    assert kept.sum() == 8000 and float(kept.min()) > 133 - 45 and float(kept.max()) < 133 + 45


def test_steps_merge_to_what_all_steps_saw() -> None:
    x = inputs(96, 12)
    steps = []
    for number, part in enumerate(x.split(32)):
        step = InputStatistics(12, gram=True, rows=8, seed=number)
        step.update(part)
        steps.append(step)
    merged, whole = steps[2], InputStatistics(12, gram=True)
    merged.merge(steps[1])
    whole.update(x[32:])
    assert (merged.count, merged.low, merged.high) == (whole.count, whole.low, whole.high)
    assert torch.equal(merged.absmax, whole.absmax)
    torch.testing.assert_close(merged.mean_abs, whole.mean_abs)
    torch.testing.assert_close(merged.gram, whole.gram)
    assert merged.histogram is not None and whole.histogram is not None and merged.sample is not None
    assert torch.equal(merged.histogram.counts, whole.histogram.counts) and len(merged.sample.rows) == 8


def test_parts_of_the_data_are_told_apart() -> None:
    x = inputs(60, 5)
    first, second = InputStatistics(5, rows=60, seed=1), InputStatistics(5, rows=60, seed=2)
    for number, part in enumerate(x.split(10)):
        (first if number < 4 else second).update(part, number % 3)
    first.merge(InputStatistics.from_state(second.state()))
    parts = [torch.cat(x.split(10)[number::3]).double() for number in range(3)]
    for number in range(3):
        others = torch.cat(parts[:number] + parts[number + 1 :])
        spans = first.spans(but=number)
        assert spans.count == 40 and torch.equal(spans.absmax.double(), others.abs().amax(0))
        torch.testing.assert_close(spans.mean_abs.double(), others.abs().mean(0), rtol=1e-6, atol=0)
        assert first.sample is not None
        kept = first.sample.rows[first.sample.folds == number]
        assert torch.equal(kept.double().sort(0).values, parts[number].sort(0).values)
    assert first.count == 60 and torch.equal(first.absmax.double(), x.double().abs().amax(0))


def test_a_restored_state_goes_on_as_if_it_had_not_stopped() -> None:
    x = inputs(90, 6)
    straight, stopped = (InputStatistics(6, gram=True, rows=10, seed=3) for _ in range(2))
    straight.update(x[:50])
    stopped.update(x[:50])
    restored = InputStatistics.from_state({name: tensor.clone() for name, tensor in stopped.state().items()})
    straight.update(x[50:])
    restored.update(x[50:])
    assert straight.state().keys() == restored.state().keys()
    assert all(torch.equal(tensor, restored.state()[name]) for name, tensor in straight.state().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    x = inputs(4, 3)
    x[2, 1] = bad
    with pytest.raises(LightX2VError, match="inf or NaN"):
        InputStatistics(3).update(x)
    with pytest.raises(LightX2VError, match="inf or NaN"):
        Histogram(3).update(x.T)


def test_zeros_and_nothing_are_seen() -> None:
    seen = InputStatistics(4, rows=2)
    seen.update(torch.empty(0, 4))
    assert seen.count == 0 and not seen.mean_abs.any()
    seen.update(torch.zeros(3, 4))
    assert seen.count == 3 and seen.low == seen.high == 0.0 and not seen.absmax.any()
