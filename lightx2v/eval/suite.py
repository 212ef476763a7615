"""Runs prompts through a generator, asks the detector what each clip shows, and counts what is right."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightx2v.eval.detector import Detection, detect
from lightx2v.eval.metrics import psnr, ssim
from lightx2v.eval.prompts import ATTRIBUTES, Request, draw_prompts

Clip = NDArray[np.uint8]
Generate = Callable[[str, int], Clip]
"""Prompt and seed to frames, uint8 [T, H, W, 3]."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a clip is from the reference's of the same prompt and seed."""

    psnr: float
    """dB; infinite when the clips are equal."""
    ssim: float
    lpips: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One prompt: what the clip shows, and how far it is from the reference's."""

    request: Request
    found: Detection
    distance: Distance | None = None
    reference_found: Detection | None = None

    @property
    def wrong(self) -> tuple[str, ...]:
        """The attributes that the clip does not show as asked."""
        return _wrong(self.request, self.found)


def _wrong(request: Request, found: Detection) -> tuple[str, ...]:
    return tuple(name for name in ATTRIBUTES if getattr(found, name) != getattr(request.scene, name))


@dataclass(frozen=True)
class Report:
    """The results of a suite."""

    results: tuple[Result, ...]
    seconds_per_clip: float

    def right(self, reference: bool = False) -> dict[str, int]:
        """Number of clips in which each attribute, and all four at once ("all"), are as asked."""
        wrong = [
            _wrong(result.request, result.reference_found if reference and result.reference_found else result.found)
            for result in self.results
        ]
        counts = {name: sum(name not in misses for misses in wrong) for name in ATTRIBUTES}
        return {**counts, "all": sum(not misses for misses in wrong)}

    @property
    def distances(self) -> list[Distance]:
        return [result.distance for result in self.results if result.distance is not None]

    def distance_summary(self) -> dict[str, float | int | None]:
        """PSNR, SSIM and LPIPS against the reference. PSNR leaves out the clips that are equal, which have none."""
        finite = [distance.psnr for distance in self.distances if math.isfinite(distance.psnr)]
        perceptual = [distance.lpips for distance in self.distances if distance.lpips is not None]
        return {
            "psnr_mean": statistics.fmean(finite) if finite else None,
            "psnr_min": min(finite, default=None),
            "ssim_mean": statistics.fmean(distance.ssim for distance in self.distances),
            "ssim_min": min(distance.ssim for distance in self.distances),
            "lpips_mean": statistics.fmean(perceptual) if perceptual else None,
            "equal_clips": len(self.distances) - len(finite),
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data. An infinite PSNR becomes null."""
        count = len(self.results)

        def shares(right: dict[str, int]) -> dict[str, dict[str, float]]:
            return {name: {"right": n, "share": n / count} for name, n in right.items()}

        report: dict[str, Any] = {
            "prompts": count,
            "seconds_per_clip": self.seconds_per_clip,
            "adherence": shares(self.right()),
        }
        if self.distances:
            report["reference_adherence"] = shares(self.right(reference=True))
            report["distance"] = self.distance_summary()
        report["clips"] = [_clip_json(result) for result in self.results]
        return report


def _clip_json(result: Result) -> dict[str, Any]:
    distance = None if result.distance is None else asdict(result.distance)
    if distance and not math.isfinite(distance["psnr"]):
        distance["psnr"] = None
    request, found = result.request, asdict(result.found)
    return {
        "prompt": request.scene.prompt,
        "seed": request.seed,
        "wrong": result.wrong,
        "found": found,
        "distance": distance,
    }


def run_suite(
    generate: Generate,
    count: int,
    seed: int = 0,
    reference: Generate | None = None,
    *,
    lpips: Callable[[Clip, Clip], float] | None = None,
    on_clip: Callable[[Result, Clip], None] | None = None,
) -> Report:
    """Generate `count` drawn prompts and look at every clip; `reference` is run on the same prompts and seeds.

    `on_clip` is called with each result and its clip. `seconds_per_clip` is the mean time of `generate`, without the
    first clip, which loads the model.
    """
    results: list[Result] = []
    times: list[float] = []
    for request in draw_prompts(count, seed):
        began = time.perf_counter()
        clip = generate(request.scene.prompt, request.seed)
        times.append(time.perf_counter() - began)
        distance = reference_found = None
        if reference is not None:
            other = reference(request.scene.prompt, request.seed)
            distance = Distance(psnr(clip, other), ssim(clip, other), lpips(clip, other) if lpips else None)
            reference_found = detect(other)
        results.append(Result(request, detect(clip), distance, reference_found))
        if on_clip is not None:
            on_clip(results[-1], clip)
    return Report(tuple(results), statistics.fmean(times[1:] or times))


def table(report: Report) -> str:
    """The report as text."""
    count, right = len(report.results), report.right()
    base = report.right(reference=True) if report.distances else None
    lines = [f"{'':<12}{'right':>7}{'of':>7}{'share':>9}" + (f"{'plain':>14}" if base else "")]
    for name, n in right.items():
        row = f"{name:<12}{n:>7}{count:>7}{n / count:>9.1%}"
        lines.append(row + (f"{base[name] / count:>14.1%}" if base else ""))
    if base:
        lines.append(_distance_line(report))
    lines.append(f"seconds per clip {report.seconds_per_clip:.2f}")
    wrong = [result for result in report.results if result.wrong]
    lines += [f"wrong: {_describe(result)}" for result in wrong[:10]]
    if len(wrong) > 10:
        lines.append(f"and {len(wrong) - 10} more")
    return "\n".join(lines)


def _distance_line(report: Report) -> str:
    found = report.distance_summary()
    parts = []
    if found["psnr_mean"] is not None:
        parts.append(f"PSNR mean {found['psnr_mean']:.2f} dB, lowest {found['psnr_min']:.2f} dB")
    parts.append(f"SSIM mean {found['ssim_mean']:.4f}, lowest {found['ssim_min']:.4f}")
    if found["lpips_mean"] is not None:
        parts.append(f"LPIPS mean {found['lpips_mean']:.4f}")
    if found["equal_clips"]:
        parts.append(f"{found['equal_clips']} clips equal")
    return "against the plain run: " + "; ".join(parts)


def _describe(result: Result) -> str:
    saw = ", ".join(f"{name} {getattr(result.found, name) or 'unclear'}" for name in result.wrong)
    return f"'{result.request.scene.prompt}', seed {result.request.seed}: {saw}"
