"""Wan's video autoencoder: diffusers' AutoencoderKLWan, with latents normalized as the transformer expects them.

Shapes: B clips, T = 4 (t - 1) + 1 frames of H x W pixels in [-1, 1]; latents [B, z, t, h, w] with h = H / 8, w = W / 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.vae.keymap import config_from_shapes, is_original, layer_names, rename


@dataclass(frozen=True, eq=False)
class WanVAE:
    """Clips to normalized latents and back."""

    module: AutoencoderKLWan
    mean: Tensor
    """[1, z, 1, 1, 1] float32, of the latents over the training data."""
    std: Tensor
    device: torch.device
    dtype: torch.dtype

    @property
    def z_dim(self) -> int:
        """Channels of the latents."""
        return self.mean.shape[1]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a clip for each step in its latents."""
        config = self.module.config
        return config.scale_factor_temporal, config.scale_factor_spatial, config.scale_factor_spatial

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] to normalized latents [B, z, t, h, w], float32: (mode - mean) / std.

        Raises ConfigError for a size that the VAE does not divide.
        """
        frames, height, width = video.shape[2:]
        time, rows, columns = self.strides
        if (frames - 1) % time or height % rows or width % columns:
            raise ConfigError(
                "video",
                f"{frames} frames of {height}x{width} do not divide into latents",
                allowed=f"{time}n+1 frames, height a multiple of {rows}, width of {columns}",
            )
        latents = self.module.encode(video.to(self.device, self.dtype)).latent_dist.mode()
        return (latents.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [B, z, t, h, w] to [B, 3, T, H, W] float32 in [-1, 1]."""
        raw = latents.to(self.device, torch.float32) * self.std + self.mean
        return self.module.decode(raw.to(self.dtype), return_dict=False)[0].float()


def image_condition(vae: WanVAE, image: Tensor, frames: int) -> Tensor:
    """What an image-to-video transformer sees beside its noisy latents: [1, 4 + z, t, h, w], float32.

    `image` is [3, H, W] in [-1, 1], the first of `frames` frames; the rest are encoded as zeros (mid-gray). The 4 mask
    channels, one per frame of a latent step, are 1 where the frame is given.
    """
    clip = torch.zeros(1, image.shape[0], frames, *image.shape[1:], device=image.device, dtype=image.dtype)
    clip[0, :, 0] = image
    latents = vae.encode(clip)
    # The first latent step stands for one frame only, and all four of its mask channels say so.
    mask = torch.zeros(1, vae.strides[0], *latents.shape[2:], device=latents.device)
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


def load_vae(path: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> WanVAE:
    """Read the VAE from Wan2.1_VAE.pth (or the same tensors in safetensors) or from diffusers' `vae` folder.

    Raises CheckpointError for a file that is missing, damaged or another model's.
    """
    checkpoint, where = Checkpoint.open(path), str(path)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    if is_original(shapes):
        config = config_from_shapes(shapes, where)
        layers = layer_names(len(config["dim_mult"]), config["num_res_blocks"])
        names = {name: rename(name, layers) or name for name in shapes}
    else:
        config, names = _diffusers_config(path), {name: name for name in shapes}
    with torch.device("meta"):
        module = AutoencoderKLWan.from_config(config).eval().requires_grad_(False)
    statistics = (module.config.latents_mean, module.config.latents_std)
    if any(len(values) != module.config.z_dim for values in statistics):
        raise CheckpointError(where, f"no mean and deviation are known for latents of {module.config.z_dim} channels")
    stream_into(module, _renamed(checkpoint, names), device=device, dtype_of=lambda name: dtype, where=where)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in statistics)
    return WanVAE(module, mean, std, device, dtype)


def _diffusers_config(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise CheckpointError(str(path), "neither Wan2.1_VAE.pth nor diffusers' vae folder with its config.json")
    return dict(AutoencoderKLWan.load_config(str(folder), local_files_only=True))


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in checkpoint.stream():
        yield names[name], tensor
