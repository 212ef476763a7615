"""How well a DiT sees clips of tiny-wan's world through noise: the PSNR that few bits take and training gives back.

Unlike the clips that a model makes up, these have a right answer, drawn by code, so that the unquantized model has a
PSNR as well, and what rounding loses of it is finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightx2v.eval.prompts import Case
from lightx2v.models.base import Conditions
from lightx2v.models.wan.dit import WanDiT
from tools.qat.studio import Studio
from tools.train_tiny import world

LEVELS = 10
"""Levels of noise, spread as the sampler's are."""
SEED = 3
"""Of the scenes and the noise; scenes that tiny-wan was trained on have other places."""


@dataclass(frozen=True)
class Noised:
    """N clips at `LEVELS` levels of noise."""

    clean: Tensor
    """Latents [N, C, t, h, w]."""
    noise: Tensor
    """The same shape."""
    texts: Tensor
    """[N, tokens, width]."""
    levels: Tensor
    """[LEVELS], 0 to 1."""


def noised(studio: Studio, count: int) -> Noised:
    """`count` rendered scenes, encoded, and noise for them."""
    generator = torch.Generator().manual_seed(SEED)
    scenes = world.random_scenes(count, generator)
    clean = studio.latents(world.render(scenes))
    texts = studio.texts([Case(scene.prompt, 0) for scene in scenes])[:count]
    even = (torch.arange(LEVELS) + 0.5) / LEVELS
    shift = studio.shift
    return Noised(clean, torch.randn(clean.shape, generator=generator), texts, shift * even / (1 + (shift - 1) * even))


@torch.no_grad()
def restored_psnr(model: WanDiT, clips: Noised) -> float:
    """Mean PSNR in dB of clean latents as `model` sees them at once in noisy ones, over clips and levels.

    A latent channel counts as one unit high, its standard deviation over the world.
    """
    found = []
    for level in clips.levels:
        noisy = torch.lerp(clips.clean, clips.noise, level)
        velocity = model(noisy, (1000 * level).expand(len(noisy)), Conditions(text=clips.texts))
        squares = (noisy - level * velocity - clips.clean).square().flatten(1).mean(1)
        found.append(-10 * squares.log10())
    return torch.stack(found).mean().item()
