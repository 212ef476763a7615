"""diffusers' WanPipeline on the parts of a plan: what `lightx2v bench e2e` runs for a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightx2v.bench import work
from lightx2v.bench.measure import Staged
from lightx2v.bench.peers.base import Choice
from lightx2v.bench.peers.diffusers import empty_transformer, quantize_blocks
from lightx2v.components import Components
from lightx2v.errors import LightX2VError
from lightx2v.foreign.build import is_fp32
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.models.wan.keymap import to_diffusers
from lightx2v.plan import Plan
from lightx2v.runner import to_frames
from lightx2v.sampling.schedule import initial_noise
from lightx2v.timing import StageTimer


def load_transformer(plan: Plan, choice: Choice, device: torch.device) -> Any:
    """diffusers' transformer with the weights of the plan's checkpoint, in either layout, quantized by the peer."""
    model: Any = empty_transformer(plan.files.arch)
    part = plan.components["dit"]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        checkpoint = Checkpoint.open(part.checkpoint)
        for name, tensor in checkpoint.stream(n for n in checkpoint.tensors if not plan.family.is_unused(n)):
            yield to_diffusers(plan.family.original_name(name)), tensor

    stream_into(
        model,
        tensors(),
        device=device,
        dtype_of=lambda name: torch.float32 if is_fp32(model, name) else getattr(torch, plan.config.dtype),
        where=str(part.checkpoint),
    )
    quantize_blocks(model.eval(), choice)
    return model


def scheduler_of(plan: Plan) -> Any:
    """diffusers' scheduler for the solver and shift of the plan."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    request = plan.request
    if request.solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=request.shift)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.shift)


def build_run(plan: Plan, choice: Choice) -> tuple[Callable[[], Staged], int]:
    """A function that makes the video of the plan's request, and the bytes of its transformer's weights.

    The noise is the engine's, so that the frames can be compared. LightX2VError for a task that this does not run.
    """
    from diffusers import WanPipeline

    request, device = plan.request, torch.device(plan.device.torch_name)
    if request.task != "t2v":
        raise LightX2VError("", f"is measured with task t2v only, this is {request.task}")
    components = Components(plan)
    with (
        components.use("t5", StageTimer(plan.device)) as encoder,
        components.use("vae", StageTimer(plan.device)) as vae,
    ):
        pass
    transformer = load_transformer(plan, choice, device)
    pipe: Any = WanPipeline(
        tokenizer=encoder.tokenizer,
        text_encoder=encoder.module,
        vae=vae.module,
        scheduler=scheduler_of(plan),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    shape = (1, *plan.family.latent_shape(request.height, request.width, request.frames))
    guidance = request.guidance if request.cfg else 1.0
    text_len = plan.config.text_len or plan.files.arch.text_len

    def run() -> Staged:
        timer = StageTimer(plan.device)
        with timer.stage("encode text"):
            cond, uncond = pipe.encode_prompt(
                request.prompt,
                request.negative_prompt,
                do_classifier_free_guidance=request.cfg,
                max_sequence_length=text_len,
                device=device,
            )
        with timer.stage("denoise"):
            latents = pipe(
                prompt_embeds=cond,
                negative_prompt_embeds=uncond,
                height=request.height,
                width=request.width,
                num_frames=request.frames,
                num_inference_steps=request.steps,
                guidance_scale=guidance,
                latents=initial_noise(shape, request.seed, device),
                output_type="latent",
            ).frames
        with timer.stage("decode"):
            frames = to_frames(vae.decode(latents))
        return Staged({stage.name: stage.seconds for stage in timer.stages}, torch.from_numpy(frames))

    return run, work.held_bytes(transformer)
