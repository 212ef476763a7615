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
from loguru import logger
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from lightx2v.encoders.keymap import T5, is_t5_original, t5_from_diffusers, t5_linear_shapes
from lightx2v.encoders.loading import component_config, fill
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.select import LayerPlan
from lightx2v.platform import probe


class GatedFeedForward(nn.Module):
    """The feed-forward layer of transformers' UMT5 with the same submodules, for any kind of linear.

    The layer of transformers casts to the dtype of `wo.weight`, which a swapped linear does not have.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = layer.wi_0, layer.wi_1, layer.wo, layer.act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.wi_0(x)) * self.wi_1(x)
        # A float `wo` may be held in a wider dtype than the rest; a swapped one casts by itself.
        return self.wo(x.to(self.wo.weight.dtype) if type(self.wo) is nn.Linear else x)


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
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=text_len,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.bool()
        self._warn_of_cuts(texts, mask, text_len)
        # No token attends to padding and its rows are zeroed: leaving it out saves most of the time.
        used = int(mask.sum(dim=1).max())
        ids, kept = tokens.input_ids[:, :used].to(self.device), mask[:, :used].to(self.device)
        states = self.module(input_ids=ids, attention_mask=kept.long()).last_hidden_state
        states = states.to(self.dtype) * kept[..., None]
        return nn.functional.pad(states, (0, 0, 0, text_len - used)), mask.to(self.device)

    def _warn_of_cuts(self, texts: list[str], mask: Tensor, text_len: int) -> None:
        for text, full in zip(texts, mask.all(dim=1).tolist(), strict=True):
            if full and (length := len(self.tokenizer(text).input_ids)) > text_len:
                logger.warning("the prompt has {} tokens, only the first {} count: {}...", length, text_len, text[:40])


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
    with torch.device("meta"):
        module = UMT5EncoderModel(config).encoder.eval()
    for block in module.block:
        block.layer[1].DenseReluDense = GatedFeedForward(block.layer[1].DenseReluDense)
    fill(
        module,
        checkpoint,
        _routes(checkpoint, original),
        T5,
        device=device,
        dtype=dtype,
        # float16 is too narrow for what `wo` adds up to, as transformers has found.
        dtype_of=lambda name: torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype,
        plans=quant_plans or {},
        auto_quant=auto_quant,
        where=str(weights),
    )
    return TextEncoder(module, _load_tokenizer(tokenizer), device, dtype)


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


def _load_tokenizer(folder: Path) -> Any:
    if not folder.is_dir():
        raise CheckpointError(str(folder), "the tokenizer folder is missing", do="copy the model's google/umt5-xxl")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(folder), f"no tokenizer could be read here: {error}") from error
