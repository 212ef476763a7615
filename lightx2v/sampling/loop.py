"""The denoising loop and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightx2v.models.base import Branch
from lightx2v.sampling.schedule import Solver

#: (latents, timestep [1], step index, branch) -> velocity
Predict = Callable[[Tensor, Tensor, int, Branch], Tensor]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a callback learns after each step."""

    step: int
    steps: int
    latents: Tensor


def guided(predict: Predict, guidance: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + guidance * (cond - uncond), in float32."""

    def velocity(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        cond = predict(latents, timestep, step, "cond").float()
        uncond = predict(latents, timestep, step, "uncond").float()
        return uncond + guidance * (cond - uncond)

    return velocity


def unguided(predict: Predict) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The conditional prediction alone: one forward pass a step."""
    return lambda latents, timestep, step: predict(latents, timestep, step, "cond").float()


def denoise(
    latents: Tensor,
    solver: Solver,
    velocity: Callable[[Tensor, Tensor, int], Tensor],
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Carry `latents` (pure noise, float32) through every step of `solver`; returns clean latents, float32."""
    for step in range(solver.steps):
        timestep = solver.timesteps[step].expand(latents.shape[0])
        latents = solver.step(velocity(latents, timestep, step), step, latents)
        if callback is not None:
            callback(Progress(step + 1, solver.steps, latents))
    return latents
