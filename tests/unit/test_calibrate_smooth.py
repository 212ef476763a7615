"""Which forwards are looked at, and that a multiplier is chosen for inputs that were not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightx2v.calibrate.smooth import find_multiplier
from lightx2v.calibrate.streams import Capture, Streams
from lightx2v.calibrate.watch import FOLDS
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.mm.scheme import parse
from lightx2v.models.base import Branch
from lightx2v.quant.calibration.observers import InputStatistics
from lightx2v.quant.calibration.smoothing import iterative_smooth

STEPS, REQUESTS, K, ROWS = 20, 8, 64, 96
STATIC = parse("int8-static")


@pytest.mark.parametrize("branches", [("cond", "uncond"), ("cond",)])
@pytest.mark.parametrize("forwards", [1, 32, 100, STEPS * 2 * REQUESTS])
def test_every_request_is_seen_in_all_its_branches(branches: tuple[Branch, ...], forwards: int, tmp_path: Path) -> None:
    """An even number of runs between two forwards would be one branch of each request alone."""
    runs = [(step, branch) for step in range(STEPS) for branch in branches]
    capture, seen = Capture(Streams(tmp_path), forwards, REQUESTS), Counter[int]()
    for number in range(REQUESTS):
        capture._request = number
        chosen = capture._chosen(runs)
        assert chosen <= set(runs)
        assert len(chosen) == min(len(runs), max(1, forwards // REQUESTS + (number < forwards % REQUESTS)))
        by_branch = Counter(branch for _, branch in chosen)
        assert len(chosen) < len(branches) or max(by_branch.values()) - min(by_branch.values()) <= 1
        assert len(by_branch) == min(len(branches), len(chosen))
        seen.update(step for step, _ in chosen)
    assert len(seen) >= min(STEPS, forwards // 2)


def part(number: int, generator: torch.Generator) -> Tensor:
    """Inputs of requests whose own channels, and some of all, are large."""
    x = torch.randn(ROWS, K, generator=generator)
    x[:, 60:] *= 4
    x[:, 4 * number : 4 * number + 4] *= 30
    return x


def error(x: Tensor, weight: Tensor, multiplier: Tensor, largest: float) -> float:
    """Of int8 codes for inputs up to `largest`, and of exact weights, in float64."""
    scale, m = largest / 127, multiplier.double()
    codes = (x.double() * m / scale).round().clamp(-127, 127)
    return float((codes * scale @ (weight.double() / m).T - x.double() @ weight.double().T).norm())


@pytest.mark.parametrize("smooth", ["smoothquant", "iterative", "awq", "flexible", "svdquant"])
def test_a_multiplier_is_no_worse_than_none_for_what_was_not_seen(smooth: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, K, generator=generator)
    seen, parts = InputStatistics(K, rows=4 * ROWS), [part(number, generator) for number in range(FOLDS)]
    for number, x in enumerate(parts):
        seen.update(x, number)
    unseen, everything = part(FOLDS, generator), torch.cat(parts)

    def unseen_error(multiplier: Tensor) -> float:
        return error(unseen, weight, multiplier, float((everything * multiplier).abs().max()))

    plain = unseen_error(torch.ones(K))
    assert unseen_error(iterative_smooth(seen.absmax, [weight])) > 3 * plain, "all channels are as large as the largest"
    recipe = CalibrationConfig(smooth=smooth)  # type: ignore[arg-type]
    found = find_multiplier(recipe, STATIC, [weight], seen, 0)
    assert found is None or unseen_error(found) < 1.1 * plain


def test_where_all_requests_are_alike_channels_are_evened_out() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, spread = torch.randn(48, K, generator=generator), torch.randn(K, generator=generator).exp()
    parts = [torch.rand(4 * ROWS, K, generator=generator).sub(0.5) * spread for _ in range(FOLDS + 1)]
    seen, unseen = InputStatistics(K, rows=4 * ROWS), parts.pop()
    for number, x in enumerate(parts):
        seen.update(x, number)
    found = find_multiplier(CalibrationConfig(smooth="iterative"), STATIC, [weight], seen, 0)
    assert found is not None
    errors = [error(unseen, weight, m, float((torch.cat(parts) * m).abs().max())) for m in (found, torch.ones(K))]
    assert errors[0] < 0.6 * errors[1]
