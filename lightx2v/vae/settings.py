"""What a VAE takes beside its weights: tiles, the layout of its convolutions, torch.compile for its decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightx2v.config.features import VaeConfig
from lightx2v.vae.tiling import enable_tiling

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def set_up(module: Any, settings: VaeConfig) -> None:
    """What the configuration asks of a diffusers autoencoder beyond its dtype. Raises ConfigError."""
    if settings.tiling:
        enable_tiling(module)
    if settings.channels_last:
        hold_channels_last(module)
    if settings.compile:
        compile_decoder(module)


def hold_channels_last(module: nn.Module) -> None:
    """Hold the weights of convolutions with the input channels last, as the tensor cores of GPUs read them.

    A convolution then computes in that layout, and what comes out of it has it too.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            weight = layer.weight.detach().to(memory_format=_LAYOUTS[layer.weight.ndim])
            layer.weight = nn.Parameter(weight, requires_grad=False)


def compile_decoder(module: Any) -> None:
    """Compile `module.decoder`. Wan's is compiled for the first frame of a clip, for the second step, and for the rest.

    Its encoder stays as it is: it runs once a request, if at all.
    """
    module.decoder.forward = torch.compile(module.decoder.forward)
