"""How the error of the latents grows from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lightx2v.sampling.loop import Progress


@dataclass
class StepRecorder:
    """Callbacks of two runs of the same requests, each first by the reference: of the first `cases` of them, the
    relative L2 distance ||z - z_ref|| / ||z_ref|| of the latents after every step. Holds one request's latents.
    """

    cases: int
    errors: list[list[float]] = field(default_factory=list)
    """By case and by step."""
    reason: str = ""
    """Why there are none."""
    _kept: list[Tensor] = field(default_factory=list)
    _begun: int = 0

    def reference(self, progress: Progress) -> None:
        """After a step of the reference."""
        if progress.step == 1:
            self._begun += 1
            self._kept = []
        if self._begun <= self.cases and isinstance(progress.latents, Tensor):
            self._kept.append(progress.latents.detach().float().cpu().clone())

    def tested(self, progress: Progress) -> None:
        """After the same step of the run that is tested."""
        if self._begun > self.cases or self.reason:
            return
        if progress.step == 1:
            self.errors.append([])
        if progress.step > len(self._kept) or not isinstance(progress.latents, Tensor):
            self._give_up("the two runs have other numbers of steps, or one tells nobody of its latents")
            return
        other, mine = self._kept[progress.step - 1], progress.latents.detach().float().cpu()
        if mine.shape != other.shape:
            self._give_up(f"the latents of step {progress.step} have other shapes in the two runs")
            return
        self.errors[-1].append(float((mine - other).norm() / other.norm()))
        if progress.step == progress.steps and progress.steps != len(self._kept):
            self._give_up(f"the runs have {progress.steps} and {len(self._kept)} steps")

    def _give_up(self, reason: str) -> None:
        self.reason, self.errors, self._kept = reason, [], []

    def result(self) -> StepErrors | None:
        """What was found; None, with a `reason`, for nothing."""
        if not self.errors and not self.reason:
            self.reason = "the pipeline tells nobody of its steps"
        return StepErrors(tuple(map(tuple, self.errors))) if self.errors else None


@dataclass(frozen=True)
class StepErrors:
    """Relative L2 errors of the latents after each step, by case and by step."""

    by_case: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> tuple[float, ...]:
        """Of all cases, by step."""
        return tuple(float(value) for value in np.mean(self.by_case, axis=0))

    def to_json(self) -> dict[str, Any]:
        return {"cases": len(self.by_case), "mean": list(self.mean), "by_case": [list(case) for case in self.by_case]}
