"""Tensor names of the image autoencoder: the original layout (`ae.safetensors`) and diffusers' AutoencoderKL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightx2v.errors import CheckpointError

_SAME = ("norm1", "conv1", "norm2", "conv2")
_RESIDUAL = {**{name: name for name in _SAME}, "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def layer_names(levels: int, depth: int) -> dict[str, str]:
    """Original layer names to diffusers' layer names, one to one, for `levels` of `depth` residual blocks.

    The original counts the levels of the decoder from the image, diffusers from the latents.
    """
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def add(original: str, module: str, layers: Mapping[str, str]) -> None:
        names.update({f"{original}.{a}": f"{module}.{b}" for a, b in layers.items()})

    for part in ("encoder", "decoder"):
        add(part, part, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"})
        add(f"{part}.mid.attn_1", f"{part}.mid_block.attentions.0", _ATTENTION)
        for index in (0, 1):
            add(f"{part}.mid.block_{index + 1}", f"{part}.mid_block.resnets.{index}", _RESIDUAL)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        add(f"encoder.down.{level}.downsample", f"{down}.downsamplers.0", {"conv": "conv"})
        add(f"decoder.up.{level}.upsample", f"{up}.upsamplers.0", {"conv": "conv"})
        for index in range(depth):
            add(f"encoder.down.{level}.block.{index}", f"{down}.resnets.{index}", _RESIDUAL)
        for index in range(depth + 1):
            add(f"decoder.up.{level}.block.{index}", f"{up}.resnets.{index}", _RESIDUAL)
    return names


def is_original(names: Iterable[str]) -> bool:
    return "encoder.down.0.block.0.conv1.weight" in names


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """Arguments of AutoencoderKL from the shapes of FLUX's original file. Raises CheckpointError.

    The scale and the shift of the latents, and the groups of the norms, are FLUX's: no tensor tells them.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(where, f"tensor '{name}' is missing", do="give FLUX.1's ae.safetensors, in full")
        return shapes[name]

    def count(pattern: str) -> int:
        return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)

    levels = count(r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "sample_size": 1024,
    }
