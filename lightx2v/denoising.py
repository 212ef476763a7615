"""One request from noise to clean latents: the sampler, the DiT, and the features around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from lightx2v.attention.policy import PolicySwitch
from lightx2v.components import LoadedDiT
from lightx2v.errors import LightX2VError
from lightx2v.features.base import RunInfo, Stack, StackFeature
from lightx2v.mm.static import StepScales
from lightx2v.models.base import Branch, Conditions, run_blocks
from lightx2v.plan import Plan
from lightx2v.plan.sampling import guidance_scales, plan_sampler
from lightx2v.request import Request
from lightx2v.sampling.loop import Progress, denoise, forwards, guided
from lightx2v.sampling.schedule import noise_source


def denoise_request(
    plan: Plan,
    loaded: LoadedDiT,
    request: Request,
    conditions: Mapping[Branch, Conditions],
    image: Tensor | None = None,
    *,
    feature: StackFeature | None = None,
    callback: Callable[[Progress], None] | None = None,
    quiet: bool = False,
) -> Tensor:
    """Clean latents [1, C, t, h, w] of a request, float32; `image` are the latents that an image-to-image one begins
    with. Raises LightX2VError when they are not finite."""
    device, dtype = torch.device(plan.device.torch_name), getattr(torch, plan.config.dtype)
    sampler = plan_sampler(plan.config, plan.family, plan.files, request, device)
    scales = guidance_scales(plan.config, request, sampler.steps)
    shape = (1, *plan.family.latent_shape(request.height, request.width, request.frames))
    latents = sampler.start(shape, noise_source(request.seed, device), image)
    dit = loaded.model
    with loaded.once.present():
        prepared = {branch: dit.prepare(made) for branch, made in conditions.items()}
        times = dit.embed_time(sampler.timesteps)
    run = RunInfo(
        sampler.steps,
        tuple(prepared),
        sampler.sigmas,
        times,
        len(dit.blocks),
        tuple(forwards(scales)),
        sampler.restarts,
    )
    feature = feature or plan.cache
    stack: Stack = run_blocks if loaded.graphs is None else loaded.graphs.stack(run_blocks)
    schedule = None if feature is None else feature.schedule(run)
    if feature is not None:
        stack = feature.begin(run, stack)
    switch = PolicySwitch(dit.attention_parts(), plan.attention_for(request))
    scales_of_inputs = StepScales(dit, sampler.steps)

    def predict(noisy: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
        time, made = times.at(step), prepared[branch]
        stream, context = dit.embed(noisy.to(dtype), time, made, step=step, branch=branch)
        switch.at(step, context.grid)
        scales_of_inputs.at(step)
        velocity: Tensor = dit.head(stack(dit, stream, context), context)
        return velocity

    passes = len(run.runs()) if feature is None else None if schedule is None else sum(schedule.values())
    moving = nullcontext() if loaded.offloaded is None else loaded.offloaded.running(passes)
    with moving, tqdm(total=sampler.steps, desc="denoise", unit="step", disable=quiet) as bar:

        def advance(progress: Progress) -> None:
            bar.update()
            if callback is not None:
                callback(progress)

        for made in prepared.values():  # tables for this shape come from the host now, not while the loop runs
            dit.embed(latents.to(dtype), times.at(0), made)
        forward = predict if feature is None else feature.around(run, predict)
        result = denoise(latents, sampler, guided(forward, scales), advance)
    if report := getattr(feature, "report", None):
        logger.info("{}", report.line())
    if not bool(torch.isfinite(result).all()):
        raise LightX2VError(
            "denoise", "the latents are not finite", do="use dtype bfloat16 or float32, or another mm_type"
        )
    return result
