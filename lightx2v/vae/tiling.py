"""Decoding and encoding in overlapping tiles, blended where they meet: less memory, and seams that can be measured."""

from __future__ import annotations

from typing import Any

from lightx2v.errors import ConfigError

OVERLAP = 0.25
"""Share of a tile that the next one covers too; both of diffusers' autoencoders have it so."""


def enable_tiling(module: Any, tile: int | None = None) -> None:
    """Make a diffusers AutoencoderKLWan or AutoencoderKL work in tiles of `tile` pixels; clips that fit one are whole.

    None takes diffusers' size: 256 for Wan, the size of the training images for AutoencoderKL. Raises ConfigError for a
    tile whose overlap is no whole number of latents, and for a model that cannot be tiled.
    """
    if not hasattr(module, "use_tiling"):
        raise ConfigError("vae.tiling", f"{type(module).__name__} has no tiles", do="set vae.tiling to false")
    module.enable_tiling()
    if tile is None:
        return
    by_axis = hasattr(module, "tile_sample_min_height")
    scale = module.spatial_compression_ratio if by_axis else 2 ** (len(module.config.block_out_channels) - 1)
    stride = int(tile * (1 - OVERLAP))
    if tile % scale or stride % scale or not stride:
        raise ConfigError("vae.tiling", f"tiles of {tile} pixels", allowed=f"multiples of {int(scale / OVERLAP)}")
    if by_axis:
        module.enable_tiling(tile, tile, stride, stride)
    else:
        module.tile_sample_min_size, module.tile_latent_min_size = tile, tile // scale
        module.tile_overlap_factor = OVERLAP
