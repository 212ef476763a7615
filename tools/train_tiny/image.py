"""tiny-wan's image encoder: a CLIP vision tower of three layers over 64x64 pictures; Wan reads the last but one."""

from __future__ import annotations

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

WIDTH, HEADS, SIZE, PATCH = 128, 2, 64, 8
#: CLIP's own normalization of pictures.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build_image_encoder() -> CLIPVisionModel:
    """A CLIP vision tower, width 128, 3 layers, 8x8 patches."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            image_size=SIZE,
            patch_size=PATCH,
            hidden_act="gelu",
        )
    )


def encode(encoder: CLIPVisionModel, pictures: Tensor) -> Tensor:
    """[B, 3, SIZE, SIZE] in [-1, 1] -> tokens [B, 65, 128]."""
    mean = pictures.new_tensor(MEAN)[:, None, None]
    std = pictures.new_tensor(STD)[:, None, None]
    hidden = encoder(pixel_values=((pictures + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    tokens: Tensor = hidden[-2]
    return tokens
