"""Wan's text encoder: the encoder half of UMT5 (Chung et al., 2023, arXiv 2304.09151), by transformers.

Shapes: B prompts, L text_len, D width.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from lightx2v.encoders.keymap import T5, is_t5_original, t5_from_diffusers, t5_linear_shapes
from lightx2v.encoders.loading import component_config, fill
from lightx2v.encoders.t5_stack import meta_stack, weight_dtypes
from lightx2v.encoders.tokens import load_tokenizer, tokenize
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.select import LayerPlan
from lightx2v.platform import probe


def clean_prompt(text: str) -> str:
    """Mend broken Unicode (where ftfy is installed), decode HTML entities twice, collapse white space."""
    if probe("ftfy").version:
        import ftfy

        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Prompts in, text conditions out."""

    module: nn.Module
    """transformers' UMT5 encoder stack."""
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, prompts: list[str], text_len: int) -> tuple[Tensor, Tensor]:
        """Encode prompts to [B, L, D] in the compute dtype and a mask [B, L], True for real tokens.

        Rows after a prompt's end are zero, as Wan has them. A prompt of more than `text_len` tokens is cut, with a
        warning.
        """
        texts = [clean_prompt(prompt) for prompt in prompts]
        all_ids, mask = tokenize(self.tokenizer, texts, text_len)
        # No token attends to padding and its rows are zeroed: leaving it out saves most of the time.
        used = int(mask.sum(dim=1).max())
        ids, kept = all_ids[:, :used].to(self.device), mask[:, :used].to(self.device)
        states = self.module(input_ids=ids, attention_mask=kept.long()).last_hidden_state
        states = states.to(self.dtype) * kept[..., None]
        return nn.functional.pad(states, (0, 0, 0, text_len - used)), mask.to(self.device)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(N, K) of the layers that can be quantized, under their original names, from the header of either layout."""
    return t5_linear_shapes(checkpoint.tensors, str(checkpoint.files[0]))


def load_text_encoder(
    weights: Path,
    tokenizer: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant_plans: Mapping[str, LayerPlan] | None = None,
    auto_quant: bool = False,
) -> TextEncoder:
    """Read Wan's text encoder from a file or folder in the original or the diffusers layout, and its tokenizer folder.

    `quant_plans` names quantized layers by their original names; `auto_quant` quantizes float weights as they arrive.
    Raises CheckpointError for files that are missing, damaged or another model's.
    """
    checkpoint = Checkpoint.open(weights)
    original = is_t5_original(checkpoint.tensors)
    config = _config_from_shapes(checkpoint) if original else UMT5Config(**component_config(weights))
    module = meta_stack(UMT5EncoderModel, config)
    fill(
        module,
        checkpoint,
        _routes(checkpoint, original),
        T5,
        device=device,
        dtype=dtype,
        dtype_of=weight_dtypes(dtype),
        plans=quant_plans or {},
        auto_quant=auto_quant,
        where=str(weights),
    )
    return TextEncoder(module, load_tokenizer(tokenizer, "google/umt5-xxl"), device, dtype)


def _config_from_shapes(checkpoint: Checkpoint) -> UMT5Config:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    linears = linear_shapes(checkpoint)
    vocabulary, width = shapes["token_embedding.weight"]
    bias = "blocks.0.pos_embedding.embedding.weight"
    if bias not in shapes:
        raise CheckpointError(str(checkpoint.files[0]), f"tensor '{bias}' is missing")
    buckets, heads = shapes[bias]
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_ff=linears["blocks.0.ffn.gate.0"][0],
        num_layers=T5.layers(shapes),
        num_heads=heads,
        d_kv=linears["blocks.0.attn.q"][0] // heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
    )


def _routes(checkpoint: Checkpoint, original: bool) -> dict[str, tuple[str, ...]]:
    if original:
        return {name: T5.to_module(name) or (name,) for name in checkpoint.tensors}
    routes: dict[str, tuple[str, ...]] = {name: (t5_from_diffusers(name),) for name in checkpoint.tensors}
    if "shared.weight" in routes and "encoder.embed_tokens.weight" in routes:
        routes["encoder.embed_tokens.weight"] = ()  # the same tensor twice
    return routes
