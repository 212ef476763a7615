"""A quantized DiT learns the velocities of the one that it was made of, on that one's own trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.eval.prompts import Case
from lightx2v.models.base import Conditions
from lightx2v.models.wan.dit import WanDiT
from tools.qat.studio import Studio


@dataclass(frozen=True)
class States:
    """Points of trajectories, and what the teacher answered: S of them."""

    latents: Tensor
    """[S, C, t, h, w]."""
    timesteps: Tensor
    """[S]."""
    texts: Tensor
    """[T, tokens, width], the texts that `said` counts."""
    said: Tensor
    """[S], int64."""
    velocities: Tensor
    """[S, C, t, h, w]."""

    def __len__(self) -> int:
        return len(self.timesteps)


def trajectories(studio: Studio, teacher: WanDiT, requests: Sequence[Case]) -> States:
    """Every evaluation of the teacher while it makes these clips, with and without their prompt."""
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    texts = studio.texts(requests)
    studio.sample(teacher, requests, texts, lambda *seen: kept.append(seen))
    latents, timesteps, said, velocities = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return States(latents, timesteps, texts, said, velocities)


@dataclass(frozen=True, slots=True)
class Pace:
    """Length and pace of the training."""

    steps: int = 200
    batch: int = 16
    lr: float = 2e-4
    seed: int = 0


def distill(
    student: WanDiT, states: States, pace: Pace, on_step: Callable[[int, float], None] | None = None
) -> list[float]:
    """Train every parameter of `student` to give the velocities of `states`; returns the losses.

    Weights that `integrations.quanto.quantize` exchanged are rounded in each pass and get straight-through gradients.
    """
    generator = torch.Generator().manual_seed(pace.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=pace.lr, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    student.train()
    for step in range(pace.steps):
        rows = torch.randint(len(states), (pace.batch,), generator=generator)
        rate = pace.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / pace.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        text = Conditions(text=states.texts[states.said[rows]])
        velocity: Tensor = student(states.latents[rows], states.timesteps[rows], text)
        loss = F.mse_loss(velocity.float(), states.velocities[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    student.eval()
    return losses
