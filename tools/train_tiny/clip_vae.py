"""Whole-clip passes through diffusers' Wan VAE, for training.

The module of diffusers walks a clip in chunks with a feature cache, which is right for inference and slow for
training. Here the same layers see all frames at once; `tests/unit/test_train_tiny.py` holds the two equal.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn
from torch.nn import functional as F


def _temporal_up(layer: WanResample, x: Tensor) -> Tensor:
    """The first frame stays one frame, each later frame becomes two. x: [B, C, T, H, W] -> [B, C, 2T-1, H, W]."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    if rest.shape[2] == 0:
        return first
    b, c, t, h, w = rest.shape
    pairs = layer.time_conv(rest).reshape(b, 2, c, t, h, w)
    return torch.cat([first, torch.stack((pairs[:, 0], pairs[:, 1]), 3).reshape(b, c, 2 * t, h, w)], 2)


class ClipResample(nn.Module):
    """A `WanResample` over whole clips; it shares that layer's parameters."""

    def __init__(self, layer: WanResample) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
        if self.layer.mode == "upsample3d":
            x = _temporal_up(self.layer, x)
        b, c, t, h, w = x.shape
        y = self.layer.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
        x = y.view(b, t, *y.shape[1:]).transpose(1, 2)
        if self.layer.mode == "downsample3d" and t > 1:
            x = torch.cat(
                [x[:, :, :1], F.conv3d(x, self.layer.time_conv.weight, self.layer.time_conv.bias, (2, 1, 1))], 2
            )
        return x


def build_vae() -> AutoencoderKLWan:
    """The architecture of tiny-wan's VAE: Wan's own, with 16 base channels and one residual block a level."""
    return AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)


def as_clip_vae(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Wrap every resampling layer of `vae` in place so that its encoder and decoder take whole clips."""
    for parent in list(vae.modules()):
        if isinstance(parent, ClipResample):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, WanResample):
                setattr(parent, name, ClipResample(child))
    return vae


def encode(vae: AutoencoderKLWan, clip: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, T, H, W] -> mean and log-variance, each [B, z, (T-1)/4+1, H/8, W/8]."""
    mean, logvar = vae.quant_conv(vae.encoder(clip)).chunk(2, dim=1)
    return mean, logvar


def decode(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """[B, z, t, h, w] -> [B, 3, 4(t-1)+1, 8h, 8w], not clamped."""
    return vae.decoder(vae.post_quant_conv(latent))
