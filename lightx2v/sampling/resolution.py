"""Changing resolution: some steps on smaller latents, which are upsampled on the way (LightX2V).

At the end of a stage the predicted data is resized, and noised anew for the stage that follows. That stage works with a
larger shift, so that it begins near the noise level at which the one before has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.errors import ConfigError
from lightx2v.sampling.schedule import TABLE, Draw, ScheduleSpec, Solver, SolverName

DEFAULT_RATE = 0.75


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps `first` to `stop` (exclusive), on latents [B, C, t, h, w] of `rate` times the height and width."""

    first: int
    stop: int
    rate: float


def plan_stages(
    steps: int, rates: float | Sequence[float] | None = None, changes: int | Sequence[int] | None = None
) -> tuple[Stage, ...]:
    """The stages of `sampling.resolution_rate` and `sampling.changing_resolution_steps`; the last has the full size.

    Left out they are 0.75 and half the steps. Raises ConfigError where they disagree with each other or with `steps`.
    """
    rates = (rates or DEFAULT_RATE,) if not isinstance(rates, Sequence) else tuple(rates)
    changes = (changes or steps // 2,) if not isinstance(changes, Sequence) else tuple(changes)
    key = "sampling.changing_resolution_steps"
    if not rates or len(rates) != len(changes):
        raise ConfigError(
            key, f"{len(changes)} changes, but {len(rates)} rates in sampling.resolution_rate", allowed="one for each"
        )
    if any(not 0 < rate <= 1 for rate in rates):
        raise ConfigError("sampling.resolution_rate", f"{list(rates)} are not rates", allowed="above 0, at most 1")
    bounds = (0, *changes, steps)
    if any(a >= b for a, b in pairwise(bounds)):
        raise ConfigError(key, f"{list(changes)} does not fit", allowed=f"rising numbers from 1 to {steps - 1}")
    return tuple(Stage(*stage) for stage in zip(bounds, bounds[1:], (*rates, 1.0), strict=False))


class ChangingResolution:
    """A `Solver` for each stage, in one: the latents that `step` returns have the size of the step that follows."""

    def __init__(
        self,
        name: SolverName,
        steps: int,
        shift: float | None,
        device: torch.device | None = None,
        *,
        stages: Sequence[Stage],
        shape: tuple[int, ...],
        patch: tuple[int, ...],
        spec: ScheduleSpec = TABLE,
    ) -> None:
        """`shape` is that of the full latents [B, C, t, h, w], `patch` the frames, rows and columns of a token."""
        self.stages, self.steps = tuple(stages), steps
        self.restarts = tuple(stage.first for stage in self.stages[1:])
        self._shapes = [_scaled(shape, stage.rate, patch) for stage in self.stages]
        self._solvers = [
            Solver(
                name,
                steps,
                # LightX2V adds 1 for every change so far; a dynamic shift follows the size by itself.
                None if shift is None and spec.kind == "dynamic" else (spec.shift if shift is None else shift) + index,
                device,
                spec=spec,
                tokens=prod(size // part for size, part in zip(self._shapes[index][2:], patch, strict=True)),
                start=stage.first,
            )
            for index, stage in enumerate(self.stages)
        ]
        lengths = [stage.stop - stage.first for stage in self.stages]
        parts = list(zip(self._solvers, lengths, strict=True))
        self.sigmas = (*(sigma for solver, length in parts for sigma in solver.sigmas[:length]), 0.0)
        self.timesteps = torch.cat([solver.timesteps[:length] for solver, length in parts])
        self._noises: list[Tensor] = []

    def start(self, shape: tuple[int, ...], draw: Draw, image: Tensor | None = None) -> Tensor:
        """Noise of the first stage's size; that of the others is drawn too, for the changes."""
        if image is not None:
            raise ConfigError(
                "sampling.changing_resolution", "does not start from an image", do="leave one of them out"
            )
        self._noises = [draw(stage_shape) for stage_shape in self._shapes]
        return self._noises[0]

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """Latents after step `index`, in the size of the next step."""
        number = next(n for n, stage in enumerate(self.stages) if index < stage.stop)
        solver, inner = self._solvers[number], index - self.stages[number].first
        if index + 1 not in self.restarts:
            return solver.step(velocity, inner, latents)
        clean = solver.clean(velocity, inner, latents)
        resized = F.interpolate(clean, size=self._shapes[number + 1][2:], mode="trilinear")
        return self._solvers[number + 1].noised(resized, self._noises[number + 1])


def _scaled(shape: tuple[int, ...], rate: float, patch: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with rows and columns times `rate`, rounded down to whole patches."""
    rows, columns = (int(size * rate) // part * part for size, part in zip(shape[-2:], patch[-2:], strict=True))
    if not rows or not columns:
        raise ConfigError("sampling.resolution_rate", f"{rate} leaves nothing of {shape[-2]}x{shape[-1]} latents")
    return (*shape[:-2], rows, columns)
