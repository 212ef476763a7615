"""From a plan to frames, and from frames to a file: encode, denoise, decode, save."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

import lightx2v
from lightx2v.components import Components
from lightx2v.config.schema import Config
from lightx2v.errors import LightX2VError
from lightx2v.families.base import Family, Session
from lightx2v.features.base import RunInfo, StackFeature
from lightx2v.io.media import write_result
from lightx2v.models.base import Branch, Conditions, run_blocks
from lightx2v.plan import Plan, resolve
from lightx2v.platform import select_device
from lightx2v.request import Request
from lightx2v.sampling.loop import Progress, denoise, guided, unguided
from lightx2v.sampling.schedule import Solver, initial_noise
from lightx2v.timing import StageTimer

DEFAULT_RESULT = "./output_lightx2v.mp4"


class Runner:
    """Holds the components of one plan and serves requests one after the other."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.family: Family = plan.family.surroundings
        self.components = Components(plan)
        self.device = torch.device(plan.device.torch_name)
        self.timer = StageTimer(plan.device)

    @torch.inference_mode()
    def run(
        self,
        request: Request,
        callback: Callable[[Progress], None] | None = None,
        quiet: bool = False,
        feature: StackFeature | None = None,
    ) -> np.ndarray:
        """Frames of `request`, uint8 [T, H, W, 3]. `timer` holds the seconds of each stage afterwards.

        `feature` takes the place of the cache that the plan names.
        """
        self._check(request)
        self.timer = StageTimer(self.plan.device)
        config, dtype = self.plan.config, getattr(torch, self.plan.config.dtype)
        session = Session(self.components, self.timer, config, self.plan.files, self.device, dtype)
        conditions = self.family.encode(session, request)
        latents = self._denoise(request, conditions, callback, quiet, feature)
        return to_frames(self.family.decode(session, latents))

    def _check(self, request: Request) -> None:
        self.plan.family.check_size(request.height, request.width, request.frames)
        self.family.check(request)
        if not request.prompt.strip():
            logger.warning("the prompt is empty: the model shows whatever it likes")

    def _denoise(
        self,
        request: Request,
        conditions: dict[Branch, Conditions],
        callback: Callable[[Progress], None] | None,
        quiet: bool,
        feature: StackFeature | None,
    ) -> Tensor:
        shape = (1, *self.plan.family.latent_shape(request.height, request.width, request.frames))
        solver = Solver(request.solver, request.steps, request.shift, self.device)  # type: ignore[arg-type]
        latents = initial_noise(shape, request.seed, self.device)
        dtype = getattr(torch, self.plan.config.dtype)
        with (
            self.components.use("dit", self.timer) as loaded,
            self.timer.stage("denoise"),
            tqdm(total=request.steps, desc="denoise", unit="step", disable=quiet) as bar,
        ):
            dit = loaded.model
            with loaded.once.present():
                prepared = {branch: dit.prepare(made) for branch, made in conditions.items()}
                times = dit.embed_time(solver.timesteps)
            run = RunInfo(solver.steps, tuple(prepared), solver.sigmas, times, len(dit.blocks))
            stack = run_blocks if feature is None else feature.begin(run, run_blocks)

            def predict(noisy: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
                time, made = times.at(step), prepared[branch]
                stream, context = dit.embed(noisy.to(dtype), time, made, step=step, branch=branch)
                velocity: Tensor = dit.head(stack(dit, stream, context), context)
                return velocity

            def advance(progress: Progress) -> None:
                bar.update()
                if callback is not None:
                    callback(progress)

            forward = predict if feature is None else feature.around(run, predict)
            velocity = guided(forward, request.cfg_scale) if request.cfg else unguided(forward)
            result = denoise(latents, solver, velocity, advance)
        if not bool(torch.isfinite(result).all()):
            raise LightX2VError(
                "denoise", "the latents are not finite", do="use dtype bfloat16 or float32, or another mm_type"
            )
        return result

    def metadata(self, request: Request) -> dict[str, str]:
        """What is written into a result: prompt, seed, the request and configuration, plan hash, versions."""
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": str(request.seed),
            "request": json.dumps(request.to_json()),
            "config": self.plan.config.model_dump_json(exclude_defaults=True),
            "plan": self.plan.hash,
            "lightx2v": lightx2v.__version__,
            "versions": json.dumps({name: version(name) for name in ("torch", "diffusers", "transformers")}),
        }


def to_frames(video: Tensor) -> np.ndarray:
    """[1, 3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    scaled = ((video[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    frames: np.ndarray = scaled.permute(1, 2, 3, 0).cpu().numpy()
    return frames


def generate(config: Config) -> Path:
    """The main job: a config in, a file out. Returns the path of the result."""
    config = config.model_copy(update={"save_result_path": config.save_result_path or DEFAULT_RESULT})
    plan = resolve(config, select_device(config.device))
    logger.info("plan {}:\n{}", plan.hash, plan.render())
    runner = Runner(plan)
    frames = runner.run(plan.request)
    assert config.save_result_path is not None
    with runner.timer.stage("save"):
        path = write_result(frames, config.save_result_path, plan.request.fps, runner.metadata(plan.request))
    logger.info("done:\n{}", runner.timer.table())
    return path
