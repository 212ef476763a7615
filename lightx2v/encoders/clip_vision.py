"""Wan's image encoder: the vision tower of CLIP ViT-H/14 (Radford et al., 2021; OpenCLIP), by transformers.

Shapes: B images, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from lightx2v.encoders.keymap import CLIP, clip_from_diffusers, clip_linear_shapes, is_clip_original
from lightx2v.encoders.loading import component_config, fill
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.select import LayerPlan

HEAD_DIM = 80
"""Of ViT-H/14; the original file does not tell its number of heads."""


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Pictures in, image conditions out."""

    module: nn.Module
    """transformers' CLIPVisionModel, less its last block and its last norm."""
    processor: Any
    device: torch.device
    dtype: torch.dtype

    def preprocess(self, images: list[Image]) -> Tensor:
        """[B, 3, S, S] float32 for RGB pictures of any size: resized, cropped to the tower's size S, normalized."""
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def encode(self, images: list[Image]) -> Tensor:
        """Encode RGB pictures to [B, 1 + P, D] in the compute dtype: the class token, then the patches.

        These are the states that enter the tower's last block, without its last norm.
        """
        pixels = self.preprocess(images).to(self.device, self.dtype)
        return self.module(pixel_values=pixels).last_hidden_state.to(self.dtype)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(N, K) of the layers that can be quantized, under their original names, from the header of either layout."""
    return clip_linear_shapes(checkpoint.tensors, str(checkpoint.files[0]))


def load_clip(
    weights: Path,
    processor: Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant_plans: Mapping[str, LayerPlan] | None = None,
    auto_quant: bool = False,
    num_heads: int | None = None,
) -> ImageEncoder:
    """Read Wan's image encoder from a file or folder in the original or the diffusers layout.

    `processor` is the folder of diffusers' `image_processor`; None takes CLIP's own preprocessing at the tower's size.
    `num_heads` applies to the original layout and defaults to a head per 80 channels. `quant_plans` names quantized
    layers by their original names; `auto_quant` quantizes float weights as they arrive. Raises CheckpointError for
    files that are missing, damaged or another model's.
    """
    checkpoint = Checkpoint.open(weights)
    original = is_clip_original(checkpoint.tensors)
    if original:
        config = _config_from_shapes(checkpoint, num_heads)
    else:
        config = CLIPVisionConfig(**component_config(weights))
        config.num_hidden_layers -= 1
    with torch.device("meta"):
        module = CLIPVisionModel(config).eval()
    module.post_layernorm = nn.Identity()
    fill(
        module,
        checkpoint,
        _routes(checkpoint, original, config.num_hidden_layers),
        CLIP,
        device=device,
        dtype=dtype,
        dtype_of=lambda name: dtype,
        plans=quant_plans or {},
        auto_quant=auto_quant,
        where=str(weights),
    )
    positions = module.embeddings.num_positions
    # No checkpoint holds this buffer, and on the meta device it has no values.
    module.embeddings.position_ids = torch.arange(positions, device=device)[None]
    return ImageEncoder(module, _load_processor(processor, config.image_size), device, dtype)


def _config_from_shapes(checkpoint: Checkpoint, num_heads: int | None) -> CLIPVisionConfig:
    where = str(checkpoint.files[0])
    linears = linear_shapes(checkpoint)
    width, channels, patch, _ = checkpoint.tensors["visual.patch_embedding.weight"].shape
    if "visual.pos_embedding" not in checkpoint.tensors:
        raise CheckpointError(where, "tensor 'visual.pos_embedding' is missing")
    positions = checkpoint.tensors["visual.pos_embedding"].shape[-2]
    heads = num_heads or width / HEAD_DIM
    if heads < 1 or heads != int(heads) or width % heads:
        raise CheckpointError(
            where,
            f"{width} channels do not divide into {heads:g} heads",
            allowed=f"a head per {HEAD_DIM} channels",
            do="set clip_num_heads in the model's config.json",
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=linears["visual.transformer.0.mlp.0"][0],
        num_attention_heads=int(heads),
        num_hidden_layers=CLIP.layers(checkpoint.tensors) - 1,
        num_channels=channels,
        patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def _routes(checkpoint: Checkpoint, original: bool, layers: int) -> dict[str, tuple[str, ...]]:
    unused = ("post_layernorm.", f"encoder.layers.{layers}.", "visual_projection.", "embeddings.position_ids")
    routes: dict[str, tuple[str, ...]] = {}
    for name in checkpoint.tensors:
        if original and (not name.startswith("visual.") or name == "visual.head"):
            routes[name] = ()  # CLIP's text tower and its projections
            continue
        targets = CLIP.to_module(name) or (name,) if original else (clip_from_diffusers(name),)
        routes[name] = () if targets[0].startswith(unused) else targets
    return routes


def _load_processor(folder: Path | None, size: int) -> CLIPImageProcessorPil:
    if folder is None:
        # diffusers' files resize the short side and crop the centre, where the original code squeezes the picture into
        # a square; the former, so that both layouts of one model give one result.
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    try:
        return CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(folder), f"no image processor could be read here: {error}") from error
