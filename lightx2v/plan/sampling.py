"""The sampler of a request, and its guidance scales: known before anything runs."""

from __future__ import annotations

from typing import Any

import torch

from lightx2v.config.schema import Config
from lightx2v.models.spec import FamilySpec
from lightx2v.request import Request
from lightx2v.sampling.build import build_sampler
from lightx2v.sampling.loop import Sampler, cfg_scales
from lightx2v.sampling.schedule import TABLE, ScheduleSpec


def plan_sampler(
    config: Config, family: FamilySpec, files: Any, request: Request, device: torch.device | None = None
) -> Sampler:
    """The sampler of `request`. Raises ConfigError for settings that do not go together."""
    scheduler = getattr(files, "scheduler", None)
    filled = {"strength": request.strength, "denoising_step_list": request.step_list}
    return build_sampler(
        config.sampling.model_copy(update=filled),
        task=request.task,
        solver=request.solver,  # type: ignore[arg-type]
        steps=request.steps,
        shift=request.shift,
        shape=(1, *family.latent_shape(request.height, request.width, request.frames)),
        patch=family.patch_size,
        spec=TABLE if scheduler is None else ScheduleSpec.from_config(scheduler),
        device=device,
    )


def guidance_scales(config: Config, request: Request, steps: int) -> tuple[float, ...]:
    """The scale of classifier-free guidance of each of the sampler's `steps`; 1 where it does not run."""
    if not request.cfg:
        return (1.0,) * steps
    return cfg_scales(steps, request.cfg_scale, config.sampling.cfg_schedule)
