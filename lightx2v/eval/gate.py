"""Limits that an evaluation has to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from lightx2v.eval.results import Report


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked for; None asks for nothing. Means over all clips."""

    min_psnr: float | None = None
    """dB; clips that are equal are not in the mean."""
    min_ssim: float | None = None
    max_lpips: float | None = None
    min_adherence: float | None = None
    """Percent of the clips that show all that was asked for."""
    max_adherence_loss: float | None = None
    """Points of these percents less than the reference's."""

    @property
    def named(self) -> dict[str, float]:
        """Those that ask for something."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}

    @property
    def need_reference(self) -> bool:
        """Whether any of them is about the distance from another run."""
        return any(name != "min_adherence" for name in self.named)

    def failures(self, report: Report) -> list[str]:
        """A line for each limit that is not kept, and for each of which nothing was measured."""
        found = report.distance_summary()
        points, base = report.points(), report.points(reference=True)
        equal = bool(report.distances) and found["equal_clips"] == len(report.distances)
        lost = None if points is None or base is None else base - points
        measured: dict[str, tuple[str, float | int | None]] = {
            "min_psnr": ("mean PSNR, dB", math.inf if equal else found["psnr_mean"]),
            "min_ssim": ("mean SSIM", found["ssim_mean"]),
            "max_lpips": ("mean LPIPS", found["lpips_mean"]),
            "min_adherence": ("clips as asked, %", points),
            "max_adherence_loss": ("points of adherence lost", lost),
        }
        lines = []
        for name, limit in self.named.items():
            what, value = measured[name]
            flag = f"--{name.replace('_', '-')} {limit:g}"
            if value is None:
                lines.append(f"{flag}: {what}: not measured")
            elif value < limit if name.startswith("min") else value > limit:
                lines.append(f"{flag}: {what}: {value:.4g}, {'below' if name.startswith('min') else 'above'} the limit")
        return lines

    def to_json(self, report: Report) -> dict[str, Any]:
        failures = self.failures(report)
        return {"limits": self.named, "passed": not failures, "failures": failures}
