"""A quantized DiT learns what the one that it was made of does at the points of that one's own trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.integrations.quanto import QuantizedLinear
from lightx2v.models.wan.dit import WanDiT
from tools.qat.states import Made, States, make

LATE, LATE_WEIGHT = 300.0, 3.0
"""Below this timestep velocities count more: the sampler's steps are long, and no later step mends an error."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Length and pace of the training; rates are Adam's, and fall to 0 as a cosine does."""

    steps: int = 250
    batch: int = 8
    """States of a step, each with and without its prompt."""
    weights: float = 0.03
    """Of weights that are rounded: the part of a layer's mean grid step that a step of Adam moves them by."""
    ranges: float = 2e-4
    """Of their ranges, in the same unit."""
    others: float = 1e-5
    """Of everything that is not rounded: embeddings, norms, biases, modulation, head."""
    streams: float = 2.0
    """What the blocks' outputs count beside the velocities."""
    warmup: int = 10
    seed: int = 0


SETTLING = Pace(steps=120, batch=16, weights=0.0, ranges=0.0, others=4e-4, seed=1)
"""What is not rounded makes up for codes that no longer change; gradients are exact then."""
PACES = {
    "qint4": (Pace(steps=500, batch=16, weights=0.016), SETTLING),
    "qint2": (Pace(ranges=5e-4, others=5e-5), replace(SETTLING, others=1e-4)),
}
"""One training after the other: what served tiny-wan best (docs/benchmarks/qat.md)."""


def loss_of(student: Made, teacher: Made, timesteps: Tensor, streams: float) -> Tensor:
    """The squared error of the guided velocities, more of the late ones, plus the blocks' relative squared errors.

    Not that of the last block, whose output counts by what the head makes of it.
    """
    weight = torch.where(timesteps < LATE, LATE_WEIGHT, 1.0)
    off = (student.velocities - teacher.velocities).square().flatten(1).mean(1)
    relative = [
        (mine - its).square().mean() / its.square().mean()
        for mine, its in zip(student.streams[:-1], teacher.streams[:-1], strict=True)
    ]
    return (weight * off).mean() + streams * torch.stack(relative).mean()


def rated(student: nn.Module, pace: Pace) -> list[dict[str, Any]]:
    """The parameters of `student` by their rates, as optimizers take them."""
    groups: list[dict[str, Any]] = []
    for layer in student.modules():
        if isinstance(layer, QuantizedLinear) and layer.ranges is not None:
            scale, low = layer.ranges
            step = float(scale.detach().abs().mean())
            top = 2 ** int(layer.spec.bits or 8) - 1 if layer.spec is not None else 1
            groups.append({"params": [layer.weight], "lr": pace.weights * step})
            groups.append({"params": [scale], "lr": pace.ranges * step})
            groups.append({"params": [low], "lr": pace.ranges * step * top / 2})
    seen = {id(parameter) for group in groups for parameter in group["params"]}
    others = [parameter for parameter in student.parameters() if id(parameter) not in seen]
    return [*groups, {"params": others, "lr": pace.others}]


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Numbers below `count`, `size` at a time and without end, none again before all others were there."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        whole = max(1, count // size) * size  # what is left is not worth a step
        yield from torch.randperm(count, generator=generator)[:whole].split(size)


def distill(
    student: WanDiT, teacher: WanDiT, states: States, pace: Pace, on_step: Callable[[int, float], None] | None = None
) -> list[float]:
    """Train every parameter of `student` to do as `teacher` at `states`; returns the losses.

    Weights that `integrations.quanto.quantize` exchanged are rounded in each pass and get straight-through gradients;
    those with learned ranges have rates of their own.
    """
    optimizer = torch.optim.AdamW(rated(student, pace), betas=(0.9, 0.99), weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / pace.warmup) * 0.5 * (1 + math.cos(math.pi * step / pace.steps)),
    )
    drawn = batches(len(states), pace.batch, pace.seed)
    losses = []
    student.train()
    for step in range(pace.steps):
        chosen = states.at(next(drawn))
        with torch.no_grad():
            wanted = make(teacher, chosen)
        loss = loss_of(make(student, chosen), wanted, chosen.timesteps, pace.streams)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    student.eval()
    return losses
