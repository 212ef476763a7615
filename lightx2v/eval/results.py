"""What an evaluation found, clip by clip, and what it comes to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightx2v.eval.detector import Detection
from lightx2v.eval.metrics import Distance
from lightx2v.eval.prompts import ATTRIBUTES, Case


@dataclass(frozen=True, slots=True)
class Result:
    """One clip: what it shows, and how far it is from the reference's."""

    case: Case
    found: Detection | None = None
    """Where the case has a scene."""
    distance: Distance | None = None
    reference_found: Detection | None = None

    @property
    def wrong(self) -> tuple[str, ...]:
        """The attributes that the clip does not show as asked."""
        return _wrong(self.case, self.found)

    @property
    def reference_wrong(self) -> tuple[str, ...]:
        """Those of the reference's clip."""
        return _wrong(self.case, self.reference_found)


def _wrong(case: Case, found: Detection | None) -> tuple[str, ...]:
    if case.scene is None or found is None:
        return ()
    return tuple(name for name in ATTRIBUTES if getattr(found, name) != getattr(case.scene, name))


def count_right(wrong: Sequence[Sequence[str]]) -> dict[str, int]:
    """In how many clips each attribute, and all four at once ("all"), are as asked, from what is wrong in each."""
    counts = {name: sum(name not in misses for misses in wrong) for name in ATTRIBUTES}
    return {**counts, "all": sum(not misses for misses in wrong)}


@dataclass(frozen=True)
class Report:
    """The results of all clips."""

    results: tuple[Result, ...]
    seconds_per_clip: float
    """Mean, without the first clip, which loads the model."""
    reference_seconds_per_clip: float | None = None

    @property
    def judged(self) -> list[Result]:
        """The clips of which it can be said whether they show what was asked for."""
        return [result for result in self.results if result.found is not None]

    def right(self, reference: bool = False) -> dict[str, int]:
        """Number of judged clips, of the reference where asked for and there, in which each attribute is as asked."""
        return count_right([r.reference_wrong if reference and r.reference_found else r.wrong for r in self.judged])

    def points(self, reference: bool = False) -> float | None:
        """Percent of the judged clips in which everything is as asked; None where none is judged."""
        return 100 * self.right(reference)["all"] / len(self.judged) if self.judged else None

    def paired_adherence(self) -> dict[str, float | int] | None:
        """Clips that only one of both shows as asked, and the points lost with their standard error."""
        pairs = [(not r.reference_wrong, not r.wrong) for r in self.judged if r.reference_found is not None]
        if not pairs:
            return None
        lost = [int(reference) - int(tested) for reference, tested in pairs]
        return {
            "lost": lost.count(1),
            "gained": lost.count(-1),
            "points_lost": 100 * statistics.fmean(lost),
            "points_lost_error": 100 * _standard_error(lost),
        }

    @property
    def distances(self) -> list[Distance]:
        return [result.distance for result in self.results if result.distance is not None]

    def distance_summary(self) -> dict[str, float | int | None]:
        """Means over the clips, and the worst clip, of every distance. PSNR leaves out clips that are equal."""
        found = self.distances
        psnr = [distance.psnr for distance in found if math.isfinite(distance.psnr)]
        changes = [d.temporal_psnr for d in found if d.temporal_psnr is not None and math.isfinite(d.temporal_psnr)]
        flicker = [distance.flicker for distance in found if distance.flicker is not None]
        perceptual = [distance.lpips for distance in found if distance.lpips is not None]
        return {
            "psnr_mean": _mean(psnr),
            "psnr_min": min(psnr, default=None),
            "psnr_error": _standard_error(psnr) if len(psnr) > 1 else None,
            "ssim_mean": _mean([distance.ssim for distance in found]),
            "ssim_min": min((distance.ssim for distance in found), default=None),
            "ms_ssim_mean": _mean([distance.ms_ssim for distance in found]),
            "ms_ssim_min": min((distance.ms_ssim for distance in found), default=None),
            "lpips_mean": _mean(perceptual),
            "lpips_max": max(perceptual, default=None),
            "temporal_psnr_mean": _mean(changes),
            "temporal_psnr_min": min(changes, default=None),
            "flicker_mean": _mean(flicker),
            "flicker_max": max(flicker, key=abs, default=None),
            "equal_clips": len(found) - len(psnr),
        }

    def lowest(self, count: int) -> list[Result]:
        """The clips of the lowest PSNR, the lowest first."""
        compared = [(r.distance.psnr, r) for r in self.results if r.distance is not None]
        return [result for _, result in sorted(compared, key=lambda pair: pair[0])[:count]]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data. An infinite PSNR becomes null."""
        judged = len(self.judged)

        def shares(right: dict[str, int]) -> dict[str, dict[str, float]]:
            return {name: {"right": n, "share": n / judged} for name, n in right.items()}

        report: dict[str, Any] = {
            "prompts": len(self.results),
            "seconds_per_clip": self.seconds_per_clip,
            "adherence": shares(self.right()) if judged else None,
        }
        if self.distances:
            report["reference_seconds_per_clip"] = self.reference_seconds_per_clip
            report["reference_adherence"] = shares(self.right(reference=True)) if judged else None
            report["paired_adherence"] = self.paired_adherence()
            report["distance"] = self.distance_summary()
        report["clips"] = [_clip_json(result) for result in self.results]
        return report


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean: how much another draw of the prompts would change it."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _clip_json(result: Result) -> dict[str, Any]:
    distance = None if result.distance is None else asdict(result.distance)
    for name in ("psnr", "temporal_psnr"):
        if distance and distance[name] is not None and not math.isfinite(distance[name]):
            distance[name] = None
    return {
        "prompt": result.case.prompt,
        "seed": result.case.seed,
        "wrong": result.wrong,
        "found": None if result.found is None else asdict(result.found),
        "distance": distance,
    }
