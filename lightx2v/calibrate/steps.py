"""Groups of steps that have scales of their own."""

from __future__ import annotations

from dataclasses import dataclass

from lightx2v.config.calibration import CalibrationConfig


@dataclass(frozen=True)
class StepGroups:
    """How the steps of a request fall into groups for scales that change: none before the first, then equal parts."""

    first: tuple[int, ...]
    steps: int

    @staticmethod
    def of(recipe: CalibrationConfig, steps: int) -> StepGroups:
        start = min(round(recipe.dynamic_share * steps), steps - 1)
        parts = min(recipe.step_groups, steps - start)
        return StepGroups(tuple(start + part * (steps - start) // parts for part in range(parts)), steps)

    def key(self, step: int, steps: int) -> int:
        """The group of a step; -1 for one whose scales are found per token."""
        there = step * self.steps // steps
        return sum(first <= there for first in self.first) - 1
