"""Tensor names of the Wan VAE: the original layout and diffusers' AutoencoderKLWan, for any width and depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightx2v.errors import CheckpointError

_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_RESIDUAL |= {"shortcut": "conv_shortcut"}
_RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}


def _within(original: str, module: str, layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{original}.{a}": f"{module}.{b}" for a, b in layers.items()}


def layer_names(levels: int, num_res_blocks: int) -> dict[str, str]:
    """Original layer names to diffusers' layer names, one to one.

    The original numbers all layers of the encoder, or of the decoder, in one list. diffusers does so in the encoder;
    its decoder has a block per level, with one residual block more than a level of the encoder.
    """
    names = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for part in ("encoder", "decoder"):
        names |= _within(part, part, {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"})
        attention = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}
        names |= _within(f"{part}.middle.1", f"{part}.mid_block.attentions.0", attention)
        for original, resnet in ((0, 0), (2, 1)):
            names |= _within(f"{part}.middle.{original}", f"{part}.mid_block.resnets.{resnet}", _RESIDUAL)
    down = num_res_blocks + 1
    up = num_res_blocks + 2
    for level in range(levels):
        for index in range(level * down, (level + 1) * down):
            layers = _RESAMPLE if index % down == num_res_blocks else _RESIDUAL
            names |= _within(f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}", layers)
        for index in range(num_res_blocks + 1):
            module = f"decoder.up_blocks.{level}.resnets.{index}"
            names |= _within(f"decoder.upsamples.{level * up + index}", module, _RESIDUAL)
        module = f"decoder.up_blocks.{level}.upsamplers.0"
        names |= _within(f"decoder.upsamples.{level * up + num_res_blocks + 1}", module, _RESAMPLE)
    return names


def rename(name: str, layers: Mapping[str, str]) -> str | None:
    """Translate a tensor's name with `layer_names` or its inverse; None for a layer that is not in it."""
    layer, _, leaf = name.rpartition(".")
    return f"{layers[layer]}.{leaf}" if layer in layers else None


def is_original(names: Iterable[str]) -> bool:
    return "encoder.conv1.weight" in names


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """Arguments of AutoencoderKLWan from the tensor shapes of an original checkpoint. Raises CheckpointError."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(where, f"tensor '{name}' is missing", do="give the Wan2.1 VAE, in full")
        return shapes[name]

    found = [re.match(r"encoder\.downsamples\.(\d+)\.", name) for name in shapes]
    layers = 1 + max((int(match[1]) for match in found if match), default=0)
    resamples = [i for i in range(layers) if f"encoder.downsamples.{i}.resample.1.weight" in shapes]
    levels = 1 + len(resamples)
    num_res_blocks, rest = divmod(layers - len(resamples), levels)
    if rest or num_res_blocks < 1 or any("downsamples.0.downsamples" in name for name in shapes):
        raise CheckpointError(
            where,
            f"{layers} encoder layers with {len(resamples)} resampling layers are not a Wan2.1 VAE",
            do="give Wan2.1_VAE.pth; the Wan2.2 VAE (48 channels) is read from its diffusers folder only",
        )
    base_dim = shape("encoder.conv1.weight")[0]
    firsts = [f"encoder.downsamples.{level * (num_res_blocks + 1)}.residual.2.weight" for level in range(levels)]
    dim_mult = [shape(name)[0] // base_dim for name in firsts]
    return {
        "base_dim": base_dim,
        "decoder_base_dim": shape("decoder.head.2.weight")[1] // dim_mult[0],
        "z_dim": shape("conv2.weight")[0],
        "dim_mult": dim_mult,
        "num_res_blocks": num_res_blocks,
        "temperal_downsample": [f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in resamples],
        "in_channels": shape("encoder.conv1.weight")[1],
        "out_channels": shape("decoder.head.2.weight")[0],
    }
