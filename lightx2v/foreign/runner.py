"""Serves requests with a pipeline of diffusers whose linear layers and attention are ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch import nn

from lightx2v.foreign import call
from lightx2v.foreign.attention import Routing, plan_attention, routed
from lightx2v.foreign.build import load_denoiser, quantize_linears
from lightx2v.foreign.caches import Cache
from lightx2v.foreign.forward import Steps
from lightx2v.foreign.layers import repeated_blocks
from lightx2v.foreign.plan import PipelinePlan
from lightx2v.foreign.schedule import scheduler_for
from lightx2v.mm.static import StepScales
from lightx2v.plan.metadata import result_metadata
from lightx2v.request import Request
from lightx2v.sampling.loop import Progress
from lightx2v.timing import StageTimer


class PipelineRunner:
    """Holds the pipeline of one plan and serves requests one after the other, as `runner.Runner` does."""

    def __init__(self, plan: PipelinePlan) -> None:
        self.plan = plan
        self.device = torch.device(plan.device.torch_name)
        self.timer = StageTimer(plan.device)
        self.routing: Routing | None = None
        """Of the latest request, where torch's own attention is not used throughout."""
        self.caches: dict[str, Cache] = {
            part.name: plan.cache.make(part.name) for part in plan.files.denoisers if plan.cache is not None
        }
        self._pipeline: Any = None
        self._scheduler: Any = None
        """The pipeline's own."""

    @torch.inference_mode()
    def run(
        self,
        request: Request,
        callback: Callable[[Progress], None] | None = None,
        quiet: bool = False,
    ) -> np.ndarray:
        """Frames of `request`, uint8 [T, H, W, 3]. `timer` holds the seconds of each stage afterwards."""
        plan = self.plan
        call.check(request, plan.config, plan.cls)
        arguments = call.arguments(request, plan.config, plan.cls, call.task_image(request.task, request.image_path))
        self.timer = StageTimer(plan.device)
        pipeline = self.pipeline
        pipeline.set_progress_bar_config(disable=quiet)
        pipeline.scheduler = scheduler_for(self._scheduler, request)
        steps = Steps(pipeline, request.steps)
        scales = [StepScales(getattr(pipeline, part.name), request.steps) for part in plan.files.denoisers]
        for of_model in scales:
            of_model.at(0)

        def told(latents: Any) -> None:
            steps.advance()
            for of_model in scales:
                of_model.at(min(steps.step, request.steps - 1))
            if callback is not None:
                callback(Progress(steps.step, steps.total, latents))

        arguments |= call.step_callback(plan.cls, told)
        self.routing = self._routing(request, steps)
        with ExitStack() as attached, self.timer.stage("generate"):
            for part in plan.files.denoisers:
                model = getattr(pipeline, part.name)
                if part.name in self.caches:
                    attached.enter_context(self.caches[part.name].attached(model, steps))
                if self.routing is not None:
                    attached.enter_context(routed(model, self.routing))
            result = pipeline(**arguments)
        for name, cache in self.caches.items():
            logger.info("{}: {}", name, cache.report.line())
        return call.frames_of(result)

    def _routing(self, request: Request, steps: Steps) -> Routing | None:
        policy, attention = self.plan.attention, self.plan.config.attention
        if len(policy.by_step) != request.steps:
            policy = plan_attention(self.plan.config, self.plan.device, request.steps)
        if set(policy.functions) == {"torch_sdpa"}:
            return None
        policy.load()
        return Routing(policy, lambda: steps.step, attention.fallback or attention.type == "auto")

    @property
    def pipeline(self) -> Any:
        """The pipeline of diffusers, loaded on first use."""
        if self._pipeline is None:
            with self.timer.stage("load"):
                self._pipeline = load_pipeline(self.plan)
            self._scheduler = getattr(self._pipeline, "scheduler", None)
        return self._pipeline

    def metadata(self, request: Request) -> dict[str, str]:
        """What is written into a result."""
        return result_metadata(self.plan, request)


def load_pipeline(plan: PipelinePlan) -> Any:
    """The pipeline with all of its parts on the plan's device, its linears as the plan has them."""
    config, device = plan.config, torch.device(plan.device.torch_name)
    dtype = getattr(torch, config.dtype)
    ours: dict[str, Any] = {}
    for part in plan.files.denoisers:
        logger.debug("loading {}", part.name)
        ours[part.name] = load_denoiser(part, plan.components[part.name], device, dtype)
        if config.compile:
            for name in repeated_blocks(ours[part.name]):
                ours[part.name].get_submodule(name).compile()
    variant = {} if plan.files.variant is None else {"variant": plan.files.variant}
    pipeline = plan.cls.from_pretrained(
        plan.files.root, **ours, **variant, **{_dtype_argument(): dtype}, local_files_only=True
    )
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in ours:
            planned = plan.components.get(name)
            if planned is not None:
                quantize_linears(component, planned.quantized(), device, dtype)
            component.to(device)
    if config.vae.tiling:
        pipeline.vae.enable_tiling()
    return pipeline


def _dtype_argument() -> str:
    """How from_pretrained calls the dtype: releases that know the new name warn of the old one."""
    from diffusers.pipelines import pipeline_utils

    return "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
