"""Requests with a cache around a DiT, in a loop of their own, and a double-stream model that can be seen through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lightx2v
from lightx2v.features.base import RunInfo, StackFeature
from lightx2v.models.base import (
    Branch,
    Conditions,
    Prepared,
    StepContext,
    Stream,
    TimeEmbedding,
    run_blocks,
)
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.dit import FluxDiT
from lightx2v.models.wan.dit import WanDiT
from lightx2v.models.wan.layout import detect
from lightx2v.sampling.loop import denoise, forwards, guided
from lightx2v.sampling.schedule import Solver, initial_noise
from tests.models import tiny_checkpoints

TINY_WAN = Path(lightx2v.__file__).parent / "assets" / "tiny-wan"


@dataclass
class Seen:
    """What a request did: its result, and the blocks that ran in each forward."""

    latents: Tensor
    blocks: dict[tuple[int, Branch], list[int]] = field(default_factory=dict)
    run: RunInfo | None = None

    @property
    def computed(self) -> dict[tuple[int, Branch], bool]:
        """By forward, whether its last block ran; a forward that did not begin is not there."""
        assert self.run is not None
        return {key: self.run.blocks - 1 in ran for key, ran in self.blocks.items()}

    def count(self, blocks: int) -> int:
        """Forwards in which so many blocks ran."""
        return sum(len(ran) == blocks for ran in self.blocks.values())


@torch.inference_mode()
def run_request(
    dit: Any,
    conditions: Mapping[Branch, Conditions],
    shape: tuple[int, ...],
    feature: StackFeature | None = None,
    *,
    steps: int = 12,
    scales: Sequence[float] | None = None,
    seed: int = 0,
    restarts: tuple[int, ...] = (),
    resize: Callable[[int, Tensor], Tensor] = lambda step, latents: latents,
) -> Seen:
    """One request of `steps` with `feature`; `scales` is the guidance of every step. `resize` changes the latents."""
    scales = scales or [2.0 if len(conditions) == 2 else 1.0] * steps
    solver = Solver("euler", steps, 3.0)
    prepared = {branch: dit.prepare(made) for branch, made in conditions.items()}
    times = dit.embed_time(solver.timesteps)
    run = RunInfo(
        steps, tuple(prepared), solver.sigmas, times, len(dit.blocks), tuple(forwards(scales)), restarts=restarts
    )
    seen = Seen(torch.empty(0), run=run)

    def counted(model: Any, stream: Stream, context: StepContext) -> Stream:
        seen.blocks.setdefault((context.step, context.branch), []).extend(block.index for block in model.blocks)
        return run_blocks(model, stream, context)

    stack = counted if feature is None else feature.begin(run, counted)

    def predict(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
        stream, context = dit.embed(latents, times.at(step), prepared[branch], step=step, branch=branch)
        velocity: Tensor = dit.head(stack(dit, stream, context), context)
        return velocity

    forward = predict if feature is None else feature.around(run, predict)
    velocity = guided(forward, scales)

    class Sized:
        """The solver, which changes the latents' shape where it is told to."""

        steps, sigmas, timesteps = solver.steps, solver.sigmas, solver.timesteps

        def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
            return resize(index + 1, solver.step(velocity, index, latents))

    noise = resize(0, initial_noise(shape, seed, torch.device("cpu")))
    seen.latents = denoise(noise, Sized(), velocity)  # type: ignore[arg-type]
    return seen


def trained_wan() -> WanDiT:
    """The embedded DiT, in float32."""
    return tiny_checkpoints.read_dit(detect(TINY_WAN, "t2v")).float()


def wan_conditions(dit: WanDiT, branches: Sequence[Branch] = ("cond", "uncond")) -> dict[Branch, Conditions]:
    """Random text, another one for each branch."""
    generator = torch.Generator().manual_seed(5)
    return {branch: Conditions(torch.randn(1, 8, dit.arch.text_dim, generator=generator)) for branch in branches}


class Branching(nn.Module):
    """Something that a cache may recall: a linear for each of two streams, both results in one tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_x, self.of_txt = nn.Linear(width, width), nn.Linear(width, width)
        self.calls = 0

    def forward(self, x: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return torch.tanh(self.of_x(x) + txt.mean(dim=1, keepdim=True)), torch.tanh(self.of_txt(txt))


class DoubleBlock(nn.Module):
    recallable: ClassVar = {"self": ("joint",), "mlp": ("mlp",)}

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.joint, self.mlp = Branching(width), nn.Linear(width, width)

    def forward(self, stream: Stream, context: StepContext) -> Stream:
        assert stream.txt is not None
        gate = context.time.blocks[:, None]
        x, txt = self.joint(stream.x, stream.txt)
        x, txt = stream.x + x * gate, stream.txt + txt * gate
        return Stream(x + self.mlp(x) * gate, txt)


class DoubleDiT(nn.Module):
    """Double-stream blocks of width `width` whose signal depends on the input."""

    time_signal = False

    def __init__(self, blocks: int = 5, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.blocks = nn.ModuleList(DoubleBlock(width, index) for index in range(blocks))
        self.out = nn.Linear(width, width)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        self.width = width

    def attention_parts(self) -> list[Any]:
        return []

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding:
        rates = torch.arange(1, self.width + 1) / self.width
        embedded = torch.cos(timesteps[:, None] / 1000 * rates)
        return TimeEmbedding(embedded, embedded)

    def prepare(self, conditions: Conditions) -> Prepared:
        return Prepared(conditions.text)

    def embed(
        self, latents: Tensor, time: TimeEmbedding, prepared: Prepared, *, step: int = 0, branch: Branch = "cond"
    ) -> tuple[Stream, StepContext]:
        x = latents.flatten(2).transpose(1, 2)
        nothing = torch.empty(0)
        context = StepContext(time, (nothing, nothing), prepared, latents.shape[2:], step, branch)  # type: ignore[arg-type]
        return Stream(x, prepared.text), context

    def signal(self, stream: Stream, context: StepContext) -> Tensor:
        return stream.x * context.time.blocks[:, None]

    def head(self, stream: Stream, context: StepContext) -> Tensor:
        assert stream.txt is not None
        made = self.out(stream.x + stream.txt.mean(dim=1, keepdim=True))
        return made.transpose(1, 2).unflatten(2, context.grid)


def double_conditions(width: int = 8, branches: Sequence[Branch] = ("cond", "uncond")) -> dict[Branch, Conditions]:
    generator = torch.Generator().manual_seed(6)
    return {branch: Conditions(torch.randn(1, 3, width, generator=generator)) for branch in branches}


def random_flux() -> FluxDiT:
    """Two double-stream and three single-stream blocks with random weights."""
    arch = FluxArch(
        dim=64,
        ffn_dim=128,
        num_heads=4,
        num_layers=2,
        num_single_layers=3,
        text_dim=24,
        pooled_dim=12,
        freq_dim=32,
        axes=(4, 6, 6),
    )
    generator = torch.Generator().manual_seed(8)
    dit = FluxDiT(arch).eval()
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.3)
    return dit


def flux_conditions(dit: FluxDiT, branches: Sequence[Branch] = ("cond", "uncond")) -> dict[Branch, Conditions]:
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    return {
        branch: Conditions(normal(6, dit.arch.text_dim), pooled=normal(dit.arch.pooled_dim), guidance=3.5)
        for branch in branches
    }
