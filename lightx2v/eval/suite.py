"""Runs prompts through a generator and a reference, clip by clip: nothing but numbers is kept of a clip."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from lightx2v.eval.detector import detect
from lightx2v.eval.metrics import Clip, Perceptual, measure
from lightx2v.eval.prompts import Case, draw_prompts
from lightx2v.eval.results import Report, Result

Generate = Callable[[str, int], Clip]
"""Prompt and seed to frames, uint8 [T, H, W, 3]."""
OnClip = Callable[[Result, Clip, Clip | None], None]
"""Called with a result, its clip and the reference's."""


def run_suite(
    generate: Generate,
    count: int,
    seed: int = 0,
    reference: Generate | None = None,
    *,
    lpips: Perceptual | None = None,
    on_clip: OnClip | None = None,
) -> Report:
    """`run_cases` with `count` drawn prompts of tiny-wan's world."""
    return run_cases(generate, draw_prompts(count, seed), reference, lpips=lpips, on_clip=on_clip)


def run_cases(
    generate: Generate,
    cases: Sequence[Case],
    reference: Generate | None = None,
    *,
    lpips: Perceptual | None = None,
    on_clip: OnClip | None = None,
) -> Report:
    """Generate every case, first by `reference`, and look at the clips: what they show, and how far they are apart."""
    results: list[Result] = []
    times: list[float] = []
    reference_times: list[float] = []
    for case in cases:
        other = None if reference is None else _timed(reference, case, reference_times)
        clip = _timed(generate, case, times)
        result = Result(
            case,
            detect(clip) if case.scene else None,
            None if other is None else measure(clip, other, lpips),
            detect(other) if case.scene and other is not None else None,
        )
        results.append(result)
        if on_clip is not None:
            on_clip(result, clip, other)
    return Report(tuple(results), _typical(times), _typical(reference_times) if reference_times else None)


def _timed(generate: Generate, case: Case, times: list[float]) -> Clip:
    began = time.perf_counter()
    clip = generate(case.prompt, case.seed)
    times.append(time.perf_counter() - began)
    return clip


def _typical(times: Sequence[float]) -> float:
    return statistics.fmean(times[1:] or times)
