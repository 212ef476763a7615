"""FLUX's text encoder: the encoder half of T5 v1.1 XXL (Raffel et al., 2020, arXiv 1910.10683), by transformers.

Shapes: B prompts, L text_len, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from lightx2v.encoders.keymap import T5_V1_1, t5_v1_1_linear_shapes
from lightx2v.encoders.loading import component_config, fill
from lightx2v.encoders.t5_stack import meta_stack, weight_dtypes
from lightx2v.encoders.tokens import load_tokenizer, tokenize
from lightx2v.errors import CheckpointError
from lightx2v.io.assembled import read_part
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.select import LayerPlan

PREFIX = "text_encoders.t5xxl.transformer."
"""ComfyUI's, in a file that holds other models too."""
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True, eq=False)
class T5Encoder:
    """Prompts in, text tokens out."""

    module: nn.Module
    """transformers' T5 encoder stack."""
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, prompts: list[str], text_len: int) -> Tensor:
        """Encode prompts to [B, L, D] in the compute dtype.

        Padding counts as text, here and in the transformer: FLUX was trained so. A prompt of more than `text_len`
        tokens is cut, with a warning.
        """
        ids, _ = tokenize(self.tokenizer, prompts, text_len)
        states: Tensor = self.module(input_ids=ids.to(self.device)).last_hidden_state
        return states.to(self.dtype)


def open_t5(path: Path, quantized: bool = False) -> Checkpoint:
    """The encoder's tensors in a folder, in a file of its own, or in one with other models. Raises CheckpointError.

    8-bit weights are floats, with their scales applied, unless the encoder is to compute with them, `quantized`.
    """
    return read_part(path, PREFIX, lambda layer: quantized)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(N, K) of the layers that can be quantized, by their names in `open_t5`."""
    return t5_v1_1_linear_shapes(checkpoint.tensors, str(checkpoint.files[0]))


def load_t5(
    weights: Path,
    tokenizer: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant_plans: Mapping[str, LayerPlan] | None = None,
    auto_quant: bool = False,
) -> T5Encoder:
    """Read the encoder from a folder with its config.json, or from a file, and its tokenizer folder.

    `quant_plans` names quantized layers; `auto_quant` quantizes float weights as they arrive. Raises CheckpointError
    for files that are missing, damaged or another model's.
    """
    checkpoint = open_t5(weights, bool(quant_plans))
    config = T5Config(**component_config(weights)) if weights.is_dir() else _config_from_shapes(checkpoint)
    module = meta_stack(T5EncoderModel, config)
    fill(
        module,
        checkpoint,
        _routes(checkpoint),
        T5_V1_1,
        device=device,
        dtype=dtype,
        dtype_of=weight_dtypes(dtype),
        plans=quant_plans or {},
        auto_quant=auto_quant,
        where=str(weights),
    )
    return T5Encoder(module, load_tokenizer(tokenizer, "tokenizer_2"), device, dtype)


def _routes(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    routes = {name: T5_V1_1.to_module(name) or (name,) for name in checkpoint.tensors}
    if "shared.weight" in routes and "encoder.embed_tokens.weight" in routes:
        routes["encoder.embed_tokens.weight"] = ()  # the same tensor twice
    return routes


def _config_from_shapes(checkpoint: Checkpoint) -> T5Config:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    linears = linear_shapes(checkpoint)
    for wanted in ("shared.weight", _BIAS):
        if wanted not in shapes:
            raise CheckpointError(str(checkpoint.files[0]), f"tensor '{wanted}' is missing")
    (vocabulary, width), (buckets, heads) = shapes["shared.weight"], shapes[_BIAS]
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_ff=linears["encoder.block.0.layer.1.DenseReluDense.wi_0"][0],
        num_layers=T5_V1_1.layers(shapes),
        num_heads=heads,
        d_kv=linears["encoder.block.0.layer.0.SelfAttention.q"][0] // heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
    )
