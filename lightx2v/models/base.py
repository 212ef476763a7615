"""What every diffusion transformer shows to the rest of the engine.

Shapes: B batch, L video or image tokens, T text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Branch = Literal["cond", "uncond"]


@dataclass(slots=True)
class Stream:
    """The tokens that pass through the blocks: `x` [B, L, D], and `txt` [B, T, D] in double-stream models."""

    x: Tensor
    txt: Tensor | None = None


@dataclass(slots=True)
class StepContext:
    """All that a block reads besides the stream. Made by `embed`, the same for every block of one forward pass."""

    temb: Tensor
    """Time embedding in the model's own form (Wan: [B, 6, D], float32)."""
    rope: tuple[Tensor, Tensor]
    """Cosines and sines of the rotary embedding, float32."""
    text: Tensor
    """Text tokens after the model's own projection, [B, T, D]."""
    text_mask: Tensor | None = None
    """[B, T] boolean, True for real tokens; None when every token counts."""
    step: int = 0
    branch: Branch = "cond"
    extra: dict[str, Any] = field(default_factory=dict)
    """Family-specific inputs (Wan: `image` tokens, `head_temb`, `grid`)."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the encoders made of one branch of a request; the arguments of `DiT.embed` besides latents and time."""

    text: Tensor
    """[B, T, text_dim] in the compute dtype."""
    text_mask: Tensor | None = None
    image: Tensor | None = None
    """Image encoder tokens [B, N, image_dim], for image-to-video."""
    latent: Tensor | None = None
    """Latents concatenated to the noisy ones along channels, [B, C', t, h, w]."""


class DiT(Protocol):
    """A diffusion transformer: embed, a list of blocks, head. It knows nothing of quantization or of features."""

    blocks: nn.ModuleList

    def embed(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, *, step: int = 0, branch: Branch = "cond"
    ) -> tuple[Stream, StepContext]: ...

    def head(self, stream: Stream, context: StepContext) -> Tensor: ...


def run_blocks(model: DiT, stream: Stream, context: StepContext) -> Stream:
    """The plain stack, block after block: what features replace when they attach."""
    for block in model.blocks:
        stream = block(stream, context)
    return stream
