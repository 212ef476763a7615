"""Points of the teacher's trajectories, and what a model makes of them: velocities and the blocks' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightx2v.eval.prompts import Case
from lightx2v.models.base import Conditions, StepContext, Stream
from lightx2v.models.wan.dit import WanDiT
from tools.qat.studio import Studio


@dataclass(frozen=True)
class States:
    """S points of trajectories."""

    latents: Tensor
    """[S, C, t, h, w]."""
    timesteps: Tensor
    """[S]."""
    texts: Tensor
    """[T + 1, tokens, width], the texts that `said` counts, and last that of no prompt."""
    said: Tensor
    """[S], int64."""
    guidance: float
    """The scale of classifier-free guidance, of all of them."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, rows: Tensor) -> States:
        """Those of `rows` [R], int64."""
        return States(self.latents[rows], self.timesteps[rows], self.texts, self.said[rows], self.guidance)


class Made(NamedTuple):
    """What a model makes of S states."""

    velocities: Tensor
    """[S, C, t, h, w], after guidance."""
    streams: list[Tensor]
    """[2 S, L, D] after each block: with the prompts first, then without."""


def trajectories(studio: Studio, teacher: WanDiT, requests: Sequence[Case]) -> States:
    """Every step of the teacher while it makes these clips."""
    texts = studio.texts(requests)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(latents: Tensor, timesteps: Tensor, said: Tensor, _: Tensor) -> None:
        if bool((said < len(requests)).all()):  # else once more, for no prompt
            seen.append((latents, timesteps, said))

    studio.sample(teacher, requests, texts, watch)
    latents, timesteps, said = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return States(latents, timesteps, texts, said, studio.guidance)


def embed(model: WanDiT, states: States) -> tuple[Stream, StepContext]:
    """What the blocks of `model` are given: [2 S, L, D], the states with their prompts first, then without."""
    none = states.texts[-1:].expand(len(states), -1, -1)
    text = Conditions(text=torch.cat((states.texts[states.said], none)))
    twice = torch.cat((states.latents, states.latents))
    time = model.embed_time(torch.cat((states.timesteps, states.timesteps)))
    return model.embed(twice, time, model.prepare(text))


def make(model: WanDiT, states: States) -> Made:
    """Velocities and streams of `model`, both branches of guidance in one pass."""
    stream, context = embed(model, states)
    streams = []
    for block in model.blocks:
        stream = block(stream, context)
        streams.append(stream.x)
    cond, uncond = model.head(stream, context).chunk(2)
    return Made(uncond + states.guidance * (cond - uncond), streams)
