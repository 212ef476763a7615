"""From latents to pixels: the VAE of a family, or a tiny decoder in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightx2v.config.schema import Config
from lightx2v.families.base import Part, PartSource, Session, open_checkpoint
from lightx2v.io.weights import Checkpoint
from lightx2v.models.spec import FamilySpec
from lightx2v.vae.settings import set_up
from lightx2v.vae.tae import load_tiny_decoder


def vae_parts(
    spec: FamilySpec,
    load: Callable[..., Any],
    encodes: Callable[[Config], bool],
    open: Callable[[Path, bool], Checkpoint] = open_checkpoint,
) -> tuple[Part, Part]:
    """The VAE that `load(path, device=, dtype=)` reads, and the tiny decoder.

    `encodes`: whether a run encodes images.
    """

    def load_vae(source: PartSource) -> Any:
        settings = source.config.vae
        vae = load(source.path, device=source.device, dtype=getattr(torch, settings.dtype))
        set_up(vae.module, settings)
        return vae

    def load_tiny(source: PartSource) -> Any:
        return load_tiny_decoder(
            source.path,
            channels=spec.latent_channels,
            stride=spec.vae_stride,
            device=source.device,
            dtype=source.dtype,
            scaled=source.config.vae.tae_scaled,
        )

    return (
        Part(
            "vae",
            "vae",
            "vae",
            load_vae,
            open=open,
            needed=lambda config: encodes(config) or not config.vae.tae,
            path=lambda config: config.vae.path,
        ),
        Part(
            "tae",
            "vae",
            "tiny_vae",
            load_tiny,
            needed=lambda config: config.vae.tae,
            path=lambda config: config.vae.tae_path,
        ),
    )


def decode(session: Session, latents: Tensor) -> Tensor:
    """Latents [1, C, t, h, w] to pixels [1, 3, T, H, W] in [-1, 1], by what the configuration names."""
    with session.use("tae" if session.config.vae.tae else "vae") as vae, session.timer.stage("decode"):
        pixels: Tensor = vae.decode(latents)
    return pixels
