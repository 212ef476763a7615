"""From a plan to frames, and from frames to a file: encode, denoise, decode, save."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import lightx2v
from lightx2v.components import Components
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError, LightX2VError
from lightx2v.io.media import read_image, write_result
from lightx2v.models.base import Branch, Conditions, run_blocks
from lightx2v.plan import Plan, resolve
from lightx2v.plan.request import Request
from lightx2v.platform import select_device
from lightx2v.sampling.loop import Progress, denoise, guided, unguided
from lightx2v.sampling.schedule import Solver, initial_noise
from lightx2v.timing import StageTimer
from lightx2v.vae.wan import image_condition

DEFAULT_RESULT = "./output_lightx2v.mp4"


class Runner:
    """Holds the components of one plan and serves requests one after the other."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.components = Components(plan)
        self.device = torch.device(plan.device.torch_name)
        self.timer = StageTimer(plan.device)

    @torch.inference_mode()
    def run(
        self, request: Request, callback: Callable[[Progress], None] | None = None, quiet: bool = False
    ) -> np.ndarray:
        """Frames of `request`, uint8 [T, H, W, 3]. `timer` holds the seconds of each stage afterwards."""
        self._check(request)
        self.timer = StageTimer(self.plan.device)
        conditions = self._encode(request)
        latents = self._denoise(request, conditions, callback, quiet)
        with self.components.use("vae", self.timer) as vae, self.timer.stage("decode"):
            video: Tensor = vae.decode(latents)
        return to_frames(video)

    def _check(self, request: Request) -> None:
        self.plan.family.check_size(request.height, request.width, request.frames)
        if request.task == "i2v" and not request.image_path:
            raise ConfigError(
                "image_path", "is missing: image-to-video starts from a picture", do="give --image_path FILE"
            )
        if request.task == "t2v" and request.image_path:
            logger.warning("image_path is ignored by task t2v")
        if not request.prompt.strip():
            logger.warning("the prompt is empty: the model shows whatever it likes")

    def _encode(self, request: Request) -> dict[Branch, Conditions]:
        image = latent = None
        if request.task == "i2v":
            image, latent = self._encode_image(request)
        text_len = self.plan.config.text_len or self.plan.files.arch.text_len
        prompts: dict[Branch, str] = {"cond": request.prompt}
        if request.cfg:
            prompts["uncond"] = request.negative_prompt
        with self.components.use("t5", self.timer) as encoder, self.timer.stage("encode text"):
            return {
                branch: Conditions(text=encoder.encode([prompt], text_len)[0], image=image, latent=latent)
                for branch, prompt in prompts.items()
            }

    def _encode_image(self, request: Request) -> tuple[Tensor, Tensor]:
        assert request.image_path is not None
        picture = read_image(request.image_path)
        with self.components.use("clip", self.timer) as encoder, self.timer.stage("encode image (CLIP)"):
            tokens: Tensor = encoder.encode([picture])
        tensor = first_frame(picture, request.height, request.width).to(self.device)
        with self.components.use("vae", self.timer) as vae, self.timer.stage("encode image (VAE)"):
            return tokens, image_condition(vae, tensor, request.frames)

    def _denoise(
        self,
        request: Request,
        conditions: dict[Branch, Conditions],
        callback: Callable[[Progress], None] | None,
        quiet: bool,
    ) -> Tensor:
        shape = (1, *self.plan.family.latent_shape(request.height, request.width, request.frames))
        solver = Solver(request.solver, request.steps, request.shift, self.device)  # type: ignore[arg-type]
        latents = initial_noise(shape, request.seed, self.device)
        dtype = getattr(torch, self.plan.config.dtype)
        with (
            self.components.use("dit", self.timer) as dit,
            self.timer.stage("denoise"),
            tqdm(total=request.steps, desc="denoise", unit="step", disable=quiet) as bar,
        ):
            prepared = {branch: dit.prepare(made) for branch, made in conditions.items()}
            times = dit.embed_time(solver.timesteps)

            def predict(noisy: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
                time, made = times.at(step), prepared[branch]
                stream, context = dit.embed(noisy.to(dtype), time, made, step=step, branch=branch)
                velocity: Tensor = dit.head(run_blocks(dit, stream, context), context)
                return velocity

            def advance(progress: Progress) -> None:
                bar.update()
                if callback is not None:
                    callback(progress)

            velocity = guided(predict, request.guidance) if request.cfg else unguided(predict)
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


def first_frame(picture: Image.Image, height: int, width: int) -> Tensor:
    """The middle of `picture` in the video's aspect ratio, resized: [3, height, width] float32 in [-1, 1]."""
    fitted = ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


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
