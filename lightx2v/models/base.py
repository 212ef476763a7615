"""What every diffusion transformer shows to the rest of the engine.

Shapes: B batch, L video or image tokens, T text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

Branch = Literal["cond", "uncond"]


@dataclass(slots=True)
class Stream:
    """The tokens that pass through the blocks: `x` [B, L, D], and `txt` [B, T, D] in double-stream models."""

    x: Tensor
    txt: Tensor | None = None


class TimeEmbedding(NamedTuple):
    """The time embedding of S timesteps, float32, in the model's own form: S is the first dimension of each."""

    head: Tensor
    blocks: Tensor

    def at(self, step: int) -> TimeEmbedding:
        """That of one timestep, S = 1."""
        return TimeEmbedding(self.head[step : step + 1], self.blocks[step : step + 1])


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a model made of the conditions of one branch of a request: the same at every step."""

    text: Tensor
    """Text tokens after the model's own projection, [B, T, D]."""
    image: Tensor | None = None
    """Image tokens after the model's own projection, [B, N, D]."""
    latent: Tensor | None = None
    """`Conditions.latent`."""
    memory: dict[int, Any] = field(default_factory=dict)
    """What each block, by its index, has made of the tokens (Wan: keys and values), kept from its first use on."""


@dataclass(slots=True)
class StepContext:
    """All that a block reads besides the stream. Made by `embed`, the same for every block of one forward pass."""

    time: TimeEmbedding
    """Of this step: S = 1, or B where every sample has a time of its own."""
    rope: tuple[Tensor, Tensor]
    """Cosines and sines of the rotary embedding, float32."""
    prepared: Prepared
    grid: tuple[int, int, int]
    """Frames, height and width of the video in tokens."""
    step: int = 0
    branch: Branch = "cond"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the encoders made of one branch of a request; what `DiT.prepare` takes."""

    text: Tensor
    """[B, T, text_dim] in the compute dtype."""
    text_mask: Tensor | None = None
    image: Tensor | None = None
    """Image encoder tokens [B, N, image_dim], for image-to-video."""
    latent: Tensor | None = None
    """Latents concatenated to the noisy ones along channels, [B, C', t, h, w]."""


class DiT(Protocol):
    """A diffusion transformer: embed, a list of blocks, head. It knows nothing of quantization or of features.

    `embed_time` and `prepare` hold what does not change from step to step, and are called once per request.
    """

    blocks: nn.ModuleList

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding: ...

    def prepare(self, conditions: Conditions) -> Prepared: ...

    def embed(
        self, latents: Tensor, time: TimeEmbedding, prepared: Prepared, *, step: int = 0, branch: Branch = "cond"
    ) -> tuple[Stream, StepContext]: ...

    def head(self, stream: Stream, context: StepContext) -> Tensor: ...


def run_blocks(model: DiT, stream: Stream, context: StepContext) -> Stream:
    """The plain stack, block after block: what features replace when they attach."""
    for block in model.blocks:
        stream = block(stream, context)
    return stream
