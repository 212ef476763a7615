"""FLUX's second text encoder: the text tower of CLIP ViT-L/14 (Radford et al., 2021), by transformers.

Shapes: B prompts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lightx2v.encoders.keymap import CLIP_TEXT, clip_text_linear_shapes, clip_text_original
from lightx2v.encoders.loading import component_config, fill
from lightx2v.encoders.tokens import load_tokenizer, tokenize
from lightx2v.errors import CheckpointError
from lightx2v.io.assembled import read_part
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.select import LayerPlan

PREFIX = "text_encoders.clip_l.transformer."
"""ComfyUI's, in a file that holds other models too."""
HEAD_DIM = 64
"""Of every text tower of CLIP; a file does not tell its number of heads."""
_UNUSED = ("text_projection.weight", "logit_scale", "text_model.embeddings.position_ids")


@dataclass(frozen=True, eq=False)
class ClipTextEncoder:
    """Prompts in, a vector for each out."""

    module: nn.Module
    """transformers' CLIPTextModel."""
    tokenizer: Any
    text_len: int
    """Positions of the tower."""
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Encode prompts to the states of their end tokens, [B, D] in the compute dtype.

        Only what fits into the tower's positions (77 tokens) counts.
        """
        ids, _ = tokenize(self.tokenizer, prompts, self.text_len, warn=False)
        pooled: Tensor = self.module(input_ids=ids.to(self.device)).pooler_output
        return pooled.to(self.dtype)


def open_clip_text(path: Path, quantized: bool = False) -> Checkpoint:
    """The tower's tensors in a folder, in a file of its own, or in one with other models. Raises CheckpointError.

    8-bit weights are floats, with their scales applied, unless the encoder is to compute with them, `quantized`.
    """
    return read_part(path, PREFIX, lambda layer: quantized)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(N, K) of the layers that can be quantized, by their original names."""
    return clip_text_linear_shapes(checkpoint.tensors, str(checkpoint.files[0]))


def load_clip_text(
    weights: Path,
    tokenizer: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant_plans: Mapping[str, LayerPlan] | None = None,
) -> ClipTextEncoder:
    """Read the tower from a folder with its config.json, or from a file, and its tokenizer folder.

    `quant_plans` names quantized layers. Raises CheckpointError for files that are missing, damaged or another model's.
    """
    checkpoint = open_clip_text(weights, bool(quant_plans))
    config = CLIPTextConfig(**component_config(weights)) if weights.is_dir() else _config_from_shapes(checkpoint)
    with torch.device("meta"):
        module = CLIPTextModel(config).eval()
    fill(
        module,
        checkpoint,
        _routes(checkpoint),
        CLIP_TEXT,
        device=device,
        dtype=dtype,
        dtype_of=lambda name: dtype,
        plans=quant_plans or {},
        auto_quant=False,
        where=str(weights),
    )
    # No checkpoint holds this buffer, and on the meta device it has no values.
    module.embeddings.position_ids = torch.arange(config.max_position_embeddings, device=device)[None]
    return ClipTextEncoder(
        module, load_tokenizer(tokenizer, "tokenizer"), config.max_position_embeddings, device, dtype
    )


def _routes(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    originals = {name: clip_text_original(name) for name in checkpoint.tensors}
    return {
        name: () if original in _UNUSED else CLIP_TEXT.to_module(original) or (name,)
        for name, original in originals.items()
    }


def _config_from_shapes(checkpoint: Checkpoint) -> CLIPTextConfig:
    shapes = {clip_text_original(name): info.shape for name, info in checkpoint.tensors.items()}
    linears = linear_shapes(checkpoint)
    tokens, positions = (f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
    for wanted in (tokens, positions):
        if wanted not in shapes:
            raise CheckpointError(str(checkpoint.files[0]), f"tensor '{wanted}' is missing")
    vocabulary, width = shapes[tokens]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=linears["text_model.encoder.layers.0.mlp.fc1"][0],
        num_attention_heads=max(1, width // HEAD_DIM),
        num_hidden_layers=CLIP_TEXT.layers(shapes),
        max_position_embeddings=shapes[positions][0],
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        eos_token_id=2,  # stands for the largest number of each prompt, as in the published configuration
    )
