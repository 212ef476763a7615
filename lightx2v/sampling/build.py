"""From the settings of a request to its sampler: the one place where they meet."""

from __future__ import annotations

from math import prod

import torch

from lightx2v.config.schema import SamplingConfig
from lightx2v.errors import ConfigError
from lightx2v.sampling.loop import Sampler
from lightx2v.sampling.resolution import ChangingResolution, plan_stages
from lightx2v.sampling.schedule import TABLE, ScheduleSpec, Solver, SolverName, first_step


def build_sampler(
    settings: SamplingConfig,
    *,
    task: str,
    solver: SolverName,
    steps: int,
    shift: float | None,
    shape: tuple[int, ...],
    patch: tuple[int, ...],
    spec: ScheduleSpec = TABLE,
    device: torch.device | None = None,
) -> Sampler:
    """The sampler of one request, whose latents have `shape` [B, C, t, h, w], in tokens of `patch` (t, h, w).

    `solver`, `steps` and `shift` are the request's, with defaults filled in; a shift of None leaves it to `spec`.
    Raises ConfigError for settings that do not go together. It needs no model: a plan may call it for the errors alone.
    """
    step_list, strength = settings.denoising_step_list, settings.strength
    if strength is not None and task != "i2i":
        raise ConfigError("sampling.strength", f"means nothing to task {task}", do="leave it out")
    if settings.changing_resolution:
        key = "sampling.changing_resolution"
        if task not in ("t2v", "t2i"):
            raise ConfigError(
                key,
                f"task {task} is conditioned on an image of one size",
                allowed="tasks t2v and t2i",
                do="set it to false",
            )
        if step_list is not None:
            raise ConfigError(key, "does not go with sampling.denoising_step_list", do="leave one of them out")
        stages = plan_stages(steps, settings.resolution_rate, settings.changing_resolution_steps)
        return ChangingResolution(solver, steps, shift, device, stages=stages, shape=shape, patch=patch, spec=spec)
    tokens = prod(size // part for size, part in zip(shape[2:], patch, strict=True))
    start = 0 if strength is None else first_step(steps, strength)
    return Solver(solver, steps, shift, device, spec=spec, tokens=tokens, step_list=step_list, start=start)
