"""The denoising loop and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightx2v.errors import ConfigError
from lightx2v.models.base import Branch
from lightx2v.sampling.schedule import Draw

#: (latents, timestep [1], step index, branch) -> velocity
Predict = Callable[[Tensor, Tensor, int, Branch], Tensor]
#: (latents, timestep [1], step index) -> velocity, float32
Velocity = Callable[[Tensor, Tensor, int], Tensor]


class Sampler(Protocol):
    """One request's way from noise to data: a `schedule.Solver`, or a `resolution.ChangingResolution`."""

    steps: int
    sigmas: tuple[float, ...]
    """Noise levels of every step and the final 0."""
    timesteps: Tensor
    """[steps], between 0 and 1000, on the device."""
    restarts: tuple[int, ...]
    """Steps at which the latents change their shape: what was kept of steps before them no longer fits."""

    def start(self, shape: tuple[int, ...], draw: Draw, image: Tensor | None = None) -> Tensor: ...

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What a callback learns after each step."""

    step: int
    steps: int
    latents: Tensor


def cfg_scales(steps: int, scale: float, schedule: str | None = None) -> tuple[float, ...]:
    """The guidance scale of every step: `scale` in the steps of the slice `schedule` ("a:b"; None: all), elsewhere 1.

    Raises ConfigError for what is no slice, and for one without a step.
    """
    if schedule is None:
        return (scale,) * steps
    try:
        first, last = (int(bound) if bound.strip() else None for bound in schedule.split(":"))
    except ValueError:
        raise ConfigError(
            "sampling.cfg_schedule", f"'{schedule}' is not a range of steps", allowed="'a:b', ':b' or 'a:'"
        ) from None
    chosen = range(steps)[first:last]
    if not chosen:
        raise ConfigError(
            "sampling.cfg_schedule",
            f"'{schedule}' has none of the {steps} steps",
            do="set sampling.cfg to false instead",
        )
    return tuple(scale if step in chosen else 1.0 for step in range(steps))


def branches(scale: float) -> tuple[Branch, ...]:
    """The forwards of a step with this guidance scale: at 1 the unconditional one would have no weight."""
    return ("cond",) if scale == 1 else ("cond", "uncond")


def forwards(scales: Sequence[float]) -> Iterator[tuple[int, Branch]]:
    """Every forward of a request in order, by step and branch: known before its loop."""
    return ((step, branch) for step, scale in enumerate(scales) for branch in branches(scale))


def guided(predict: Predict, guidance: float | Sequence[float]) -> Velocity:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + scale * (cond - uncond), in float32.

    `guidance` is one scale, or one for every step; a scale of 1 takes the conditional prediction alone.
    """

    def velocity(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        scale = guidance[step] if isinstance(guidance, Sequence) else guidance
        cond = predict(latents, timestep, step, "cond").float()
        if len(branches(scale)) == 1:
            return cond
        uncond = predict(latents, timestep, step, "uncond").float()
        return uncond + scale * (cond - uncond)

    return velocity


def denoise(
    latents: Tensor,
    sampler: Sampler,
    velocity: Velocity,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Carry `latents` (what `sampler.start` gave, float32) through every step; returns clean latents, float32."""
    for step in range(sampler.steps):
        timestep = sampler.timesteps[step].expand(latents.shape[0])
        latents = sampler.step(velocity(latents, timestep, step), step, latents)
        if callback is not None:
            callback(Progress(step + 1, sampler.steps, latents))
    return latents
