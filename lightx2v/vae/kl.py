"""FLUX's image autoencoder: diffusers' AutoencoderKL, with latents normalized as the transformer expects them.

Shapes: B images of H x W pixels in [-1, 1], as clips of one frame; latents [B, z, 1, h, w] with h = H / 8, w = W / 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io.assembled import read_part
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.vae.kl_keymap import config_from_shapes, is_original, layer_names

PREFIX = "vae."
"""ComfyUI's, in a file that holds other models too."""


@dataclass(frozen=True, eq=False)
class ImageVAE:
    """Images to normalized latents and back."""

    module: AutoencoderKL
    shift: float
    """Taken from the latents before they are multiplied by `scale`."""
    scale: float
    device: torch.device
    dtype: torch.dtype

    @property
    def z_dim(self) -> int:
        """Channels of the latents."""
        return int(self.module.config.latent_channels)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a clip for each step in its latents."""
        size = 2 ** (len(self.module.config.block_out_channels) - 1)
        return 1, size, size

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, 1, H, W] in [-1, 1] to normalized latents [B, z, 1, h, w], float32: (mode - shift) * scale.

        Raises ConfigError for a size that the VAE does not divide.
        """
        frames, height, width = images.shape[2:]
        _, rows, columns = self.strides
        if frames != 1 or height % rows or width % columns:
            raise ConfigError(
                "image",
                f"{frames} frames of {height}x{width} do not divide into latents",
                allowed=f"one frame, height a multiple of {rows}, width of {columns}",
            )
        latents = self.module.encode(images[:, :, 0].to(self.device, self.dtype)).latent_dist.mode()
        return ((latents.float() - self.shift) * self.scale)[:, :, None]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [B, z, 1, h, w] to [B, 3, 1, H, W] float32 in [-1, 1]."""
        raw = latents[:, :, 0].to(self.device, torch.float32) / self.scale + self.shift
        images: Tensor = self.module.decode(raw.to(self.dtype), return_dict=False)[0]
        return images.float().clamp(-1, 1)[:, :, None]


def open_vae(path: Path, quantized: bool = False) -> Checkpoint:
    """The autoencoder's tensors in a folder, in a file of its own, or in one with other models. Raises CheckpointError.

    8-bit weights are floats: the autoencoder is never `quantized`.
    """
    return read_part(path, PREFIX, lambda layer: quantized)


def load_vae(path: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> ImageVAE:
    """Read the VAE from ae.safetensors, from a file that holds other models too, or from diffusers' `vae` folder.

    Raises CheckpointError for a file that is missing, damaged or another model's.
    """
    checkpoint, where = open_vae(path), str(path)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    if is_original(shapes):
        config = config_from_shapes(shapes, where)
        layers = layer_names(len(config["block_out_channels"]), config["layers_per_block"])
    else:
        config, layers = _diffusers_config(path), {}
    with torch.device("meta"):
        module = AutoencoderKL.from_config(config).eval().requires_grad_(False)
    stream_into(module, _renamed(checkpoint, layers), device=device, dtype_of=lambda name: dtype, where=where)
    return ImageVAE(module, module.config.shift_factor or 0.0, module.config.scaling_factor, device, dtype)


def _diffusers_config(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise CheckpointError(str(path), "neither ae.safetensors nor diffusers' vae folder with its config.json")
    config = dict(AutoencoderKL.load_config(str(folder), local_files_only=True))
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise CheckpointError(str(folder), f"is the config of a {config['_class_name']}", allowed="AutoencoderKL")
    return config


def _renamed(checkpoint: Checkpoint, layers: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in checkpoint.stream():
        layer, _, leaf = name.rpartition(".")
        # The original's attention is made of 1 x 1 convolutions, diffusers' of linears.
        attention = layer in layers and ".attn_1." in name and tensor.ndim == 4
        yield f"{layers.get(layer, layer)}.{leaf}", tensor[:, :, 0, 0] if attention else tensor
