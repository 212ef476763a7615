"""tiny-wan's text-to-video around another DiT than its own, many clips at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.components import Components
from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError
from lightx2v.eval.metrics import Clip
from lightx2v.eval.prompts import Case
from lightx2v.families.base import Session
from lightx2v.models.base import Branch, Conditions
from lightx2v.models.wan.dit import WanDiT
from lightx2v.plan import Plan, resolve
from lightx2v.plan.sampling import guidance_scales, plan_sampler
from lightx2v.platform import select_device
from lightx2v.runner import to_frames
from lightx2v.sampling.loop import Sampler, denoise, guided
from lightx2v.sampling.schedule import noise_source
from lightx2v.timing import StageTimer

TOGETHER = 16
"""Clips that are sampled at a time."""
CPU = torch.device("cpu")
#: (latents [B, C, t, h, w], timesteps [B], texts of the table [B], velocities [B, C, t, h, w])
Watch = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Studio:
    """The encoder, sampler and VAE of tiny-wan with its own settings, in float32 on a CPU."""

    def __init__(self, steps: int | None = None) -> None:
        settings: dict[str, Any] = {"task": "t2v", "dtype": "float32", "device": "cpu"}
        config = load_config(None, settings if steps is None else {**settings, "sampling.steps": steps}, [])
        self.plan: Plan = resolve(config, select_device("cpu"))
        self._parts, timer = Components(self.plan), StageTimer(self.plan.device)
        self._session = Session(self._parts, timer, config, self.plan.files, CPU, torch.float32)
        self._family = self.plan.family.surroundings

    @property
    def guidance(self) -> float:
        """The guidance scale of every step. Raises ConfigError where it changes."""
        first, *others = guidance_scales(self.plan.config, self.plan.request, self._sampler().steps)
        if any(scale != first for scale in others):
            raise ConfigError("sampling.cfg_schedule", "guidance changes", do="train with one scale for all steps")
        return first

    @property
    def shift(self) -> float:
        """That of the sampler's levels of noise. Raises ConfigError where it is not known before the run."""
        shift = self.plan.request.shift
        if shift is None:
            raise ConfigError("sampling.shift", "depends on the size", do="set it")
        return shift

    def _sampler(self) -> Sampler:
        plan = self.plan
        return plan_sampler(plan.config, plan.family, plan.files, plan.request, CPU)

    def model(self) -> WanDiT:
        """A DiT of its own, with the trained weights."""
        with self._session.use("dit") as loaded, loaded.once.present():
            state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        model = WanDiT(self.plan.files.arch)
        model.load_state_dict(state)
        return model.eval()

    @torch.no_grad()
    def texts(self, requests: Sequence[Case]) -> Tensor:
        """[T + 1, tokens, width]: what the DiT is told of each prompt, and last of none."""
        made = [self._family.encode(self._session, replace(self.plan.request, prompt=r.prompt)) for r in requests]
        texts = [*(each["cond"].text for each in made), made[0]["uncond"].text]
        length = self.plan.files.arch.text_len
        return torch.cat([F.pad(text, (0, 0, 0, length - text.shape[1])) for text in texts])

    @torch.no_grad()
    def sample(
        self, model: WanDiT, requests: Sequence[Case], texts: Tensor, watch: Watch | None = None
    ) -> list[Tensor]:
        """Clean latents [1, C, t, h, w] of each request; `watch` is told of every evaluation of the model."""
        plan, made = self.plan, list[Tensor]()
        shape = (1, *plan.family.latent_shape(plan.request.height, plan.request.width, plan.request.frames))
        for first in range(0, len(requests), TOGETHER):
            rows = torch.arange(first, min(first + TOGETHER, len(requests)))
            said: dict[Branch, Tensor] = {"cond": rows, "uncond": torch.full_like(rows, len(requests))}

            def predict(
                noisy: Tensor, timestep: Tensor, step: int, branch: Branch, said: dict[Branch, Tensor] = said
            ) -> Tensor:
                velocity: Tensor = model(noisy, timestep.float(), Conditions(text=texts[said[branch]]))
                if watch is not None:
                    watch(noisy, timestep.float(), said[branch], velocity)
                return velocity

            sampler = self._sampler()
            noise = [sampler.start(shape, noise_source(requests[row].seed, CPU)) for row in rows.tolist()]
            scales = guidance_scales(plan.config, plan.request, sampler.steps)
            made.extend(denoise(torch.cat(noise), sampler, guided(predict, scales)).split(1))
        return made

    @torch.inference_mode()
    def clip(self, latents: Tensor) -> Clip:
        """Frames, uint8 [T, H, W, 3], of latents [1, C, t, h, w]."""
        return to_frames(self._family.decode(self._session, latents))

    @torch.no_grad()
    def latents(self, clips: Tensor) -> Tensor:
        """Latents [B, C, t, h, w], normalized, of clips [B, 3, T, H, W] in [-1, 1]."""
        with self._session.use("vae") as vae:
            return torch.cat([vae.encode(clip[None]) for clip in clips])
