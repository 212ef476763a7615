"""What every diffusion transformer shows to the rest of the engine.

Shapes: B batch, L video or image tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    pooled: Tensor | None = None
    """What the pooled text and the embedded guidance add to the time embedding, [B, D] float32."""
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
    """Latents that the model sees beside the noisy ones, [B, C', t, h, w]: along channels, or as further tokens."""
    pooled: Tensor | None = None
    """The text in one vector [B, P], for models that take one."""
    guidance: float | None = None
    """The guidance scale, for models that were distilled to take it as an input."""


class AttentionPart(NamedTuple):
    """One attention of a model: `module.attention` is the function that it calls."""

    layer: int
    """Index of its block."""
    part: Literal["self", "cross", "image"]
    """To the tokens themselves (and to the text, where both are one sequence), to the text, or to image tokens."""
    module: nn.Module
    name: str = "attention"
    """The attribute of `module` that holds the function."""


class DiT(Protocol):
    """A diffusion transformer: embed, a list of blocks, head. It knows nothing of quantization or of features.

    `embed_time` and `prepare` hold what does not change from step to step, and are called once per request.
    A block has `index`, its place in `blocks`, and `compute`, which takes and gives tensors only. Its class says in
    `recallable` which of its submodules make a residual branch, before the gate: kind ("self", "cross" or "mlp") to
    names.
    """

    @property
    def fp32_names(self) -> Sequence[str]:
        """Globs of the parameters to keep in float32 whatever the compute dtype."""
        ...

    @property
    def once(self) -> Sequence[str]:
        """Submodules that only `embed_time` and `prepare` read."""
        ...

    @property
    def time_signal(self) -> bool:
        """Whether `signal` depends on the timestep alone."""
        ...

    @property
    def blocks(self) -> nn.ModuleList | Sequence[nn.Module]: ...

    def attention_parts(self) -> Iterable[AttentionPart]: ...

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding: ...

    def prepare(self, conditions: Conditions) -> Prepared: ...

    def embed(
        self, latents: Tensor, time: TimeEmbedding, prepared: Prepared, *, step: int = 0, branch: Branch = "cond"
    ) -> tuple[Stream, StepContext]: ...

    def signal(self, stream: Stream, context: StepContext) -> Tensor:
        """What tells how much a step differs from the one before: the time embedding, or the first block's input."""
        ...

    def head(self, stream: Stream, context: StepContext) -> Tensor: ...


def set_attention(model: DiT, fn: Any) -> None:
    """Use `fn`, an `attention.base.AttentionFn`, for every attention of `model`."""
    for part in model.attention_parts():
        setattr(part.module, part.name, fn)


def run_blocks(model: DiT, stream: Stream, context: StepContext, start: int = 0, stop: int | None = None) -> Stream:
    """The plain stack, block after block: what features replace when they attach."""
    for block in list(model.blocks)[start:stop]:
        stream = block(stream, context)
    return stream
