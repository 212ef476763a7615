"""From a plan to frames, and from frames to a file: encode, denoise, decode, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from lightx2v import foreign
from lightx2v.components import Components
from lightx2v.config.features import LoraConfig
from lightx2v.config.schema import Config
from lightx2v.denoising import denoise_request
from lightx2v.errors import ConfigError
from lightx2v.families.base import Family, Session
from lightx2v.features.base import StackFeature
from lightx2v.io.media import write_result
from lightx2v.models.base import Branch, Conditions
from lightx2v.plan import Plan, resolve
from lightx2v.plan.features import replan_loras
from lightx2v.plan.metadata import result_metadata
from lightx2v.platform import select_device
from lightx2v.request import Request
from lightx2v.sampling.loop import Progress
from lightx2v.timing import StageTimer

DEFAULT_RESULT = "./output_lightx2v"
"""Without its ending, which goes by the task."""


class Runner:
    """Holds the components of one plan and serves requests one after the other; `fuse` as in `components.load_dit`."""

    def __init__(self, plan: Plan, fuse: bool = True) -> None:
        self.plan = plan
        self.family: Family = plan.family.surroundings
        self.components = Components(plan, fuse)
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
        session = self._session()
        self.components.load_ahead("dit")  # while the encoders load and compute
        conditions, image = self._encode(session, request)
        with session.use("dit") as loaded, self.timer.stage("denoise"):
            latents = denoise_request(
                self.plan, loaded, request, conditions, image, feature=feature, callback=callback, quiet=quiet
            )
        return to_frames(self.family.decode(session, latents))

    @torch.inference_mode()
    def encode(self, request: Request) -> tuple[dict[Branch, Conditions], Tensor | None]:
        """What `denoise_request` takes of `request`: the conditions of its branches, and the latents of its image."""
        self._check(request)
        return self._encode(self._session(), request)

    def _session(self) -> Session:
        config, dtype = self.plan.config, getattr(torch, self.plan.config.dtype)
        return Session(self.components, self.timer, config, self.plan.files, self.device, dtype)

    def _encode(self, session: Session, request: Request) -> tuple[dict[Branch, Conditions], Tensor | None]:
        return self.family.encode(session, request), self.family.image_latents(session, request)

    def _check(self, request: Request) -> None:
        self.plan.family.check_size(request.height, request.width, request.frames)
        self.family.check(request)
        if not request.prompt.strip():
            logger.warning("the prompt is empty: the model shows whatever it likes")

    def switch_lora(self, loras: Sequence[LoraConfig]) -> None:
        """Exchange the LoRAs of the loaded DiT. Raises ConfigError and CheckpointError, and changes nothing."""
        plan = replan_loras(self.plan, loras)
        with self.components.use("dit", self.timer) as loaded:
            if loaded.loras.switch(plan.loras) and loaded.graphs is not None:
                loaded.graphs.forget()
        self.plan = self.components.plan = plan

    def metadata(self, request: Request) -> dict[str, str]:
        """What is written into a result."""
        return result_metadata(self.plan, request)


def to_frames(video: Tensor) -> np.ndarray:
    """[1, 3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    scaled = ((video[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    frames: np.ndarray = scaled.permute(1, 2, 3, 0).cpu().numpy()
    return frames


def open_plan(config: Config) -> Plan | foreign.PipelinePlan:
    """The plan of `config` on its device: of a model of this engine, or of a pipeline of diffusers. UserError."""
    if config.model_cls == foreign.MODEL_CLS:
        return foreign.resolve(config, select_device(config.device))
    if config.pipeline_args:
        raise ConfigError("pipeline_args", "is set", do=f"set model_cls to {foreign.MODEL_CLS}, or remove it")
    return resolve(config, select_device(config.device))


def make_runner(plan: Plan | foreign.PipelinePlan) -> Runner | foreign.PipelineRunner:
    """What serves requests by `plan`."""
    return Runner(plan) if isinstance(plan, Plan) else foreign.PipelineRunner(plan)


def generate(config: Config) -> Path:
    """The main job: a config in, a file out. Returns the path of the result."""
    default = DEFAULT_RESULT + (".png" if config.task.endswith("i") else ".mp4")
    config = config.model_copy(update={"save_result_path": config.save_result_path or default})
    plan = open_plan(config)
    logger.info("plan {}:\n{}", plan.hash, plan.render())
    runner = make_runner(plan)
    if config.warmup:
        runner.run(plan.request, quiet=True)
    frames = runner.run(plan.request)
    assert config.save_result_path is not None
    with runner.timer.stage("save"):
        path = write_result(frames, config.save_result_path, plan.request.fps, runner.metadata(plan.request))
    logger.info("done:\n{}", runner.timer.table())
    return path
