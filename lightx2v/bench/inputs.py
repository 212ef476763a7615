"""What one forward pass of a diffusion transformer reads in `lightx2v bench dit`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightx2v.bench import work
from lightx2v.models.base import Conditions
from lightx2v.models.wan.arch import WanArch

TIMESTEP = 500.0


@dataclass(frozen=True, slots=True)
class Size:
    """A video, in pixels."""

    width: int
    height: int
    frames: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one forward pass reads, the same for all candidates."""

    latents: Tensor
    """[1, C, t, h, w] bfloat16: the noisy latents and, for image-to-video, what is concatenated to them."""
    timestep: Tensor
    text: Tensor
    """[1, T, text_dim] bfloat16."""
    image: Tensor | None
    """[1, 257, image_dim] bfloat16, for image-to-video."""

    @property
    def conditions(self) -> Conditions:
        return Conditions(text=self.text, image=self.image)


def make_inputs(arch: WanArch, size: Size, device: torch.device, seed: int) -> Inputs:
    """Normal random inputs for a video of `size`."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=work.DTYPE, device=device).normal_(generator=generator)

    grid = work.family().latent_shape(size.height, size.width, size.frames)[1:]
    return Inputs(
        normal(1, arch.in_dim, *grid),
        torch.tensor([TIMESTEP], device=device),
        normal(1, arch.text_len, arch.text_dim),
        normal(1, work.IMAGE_TOKENS, arch.image_dim) if arch.model_type == "i2v" else None,
    )


def token_count(size: Size) -> int:
    """Length of the DiT's sequence for a video of `size`. Raises ConfigError where the size does not fit the family."""
    family = work.family()
    family.check_size(size.height, size.width, size.frames)
    _, t, h, w = family.latent_shape(size.height, size.width, size.frames)
    pt, ph, pw = family.patch_size
    return (t // pt) * (h // ph) * (w // pw)
