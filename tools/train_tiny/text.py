"""tiny-wan's tokenizer and text encoder: one token a word, and a UMT5 of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tools.train_tiny import world

TEXT_LEN = 32
#: Ids of the three special tokens as in UMT5: padding, end of text, unknown.
SPECIAL = ("<pad>", "</s>", "<unk>")


def vocabulary() -> list[str]:
    """Special tokens, then every word of the world, in a fixed order, and the article of "an orange circle"."""
    words = sorted({word for scene in world.all_scenes() for word in scene.prompt.split()})
    return [*SPECIAL, *words, "an"]


def write_tokenizer(folder: Path) -> None:
    """Save a word-level tokenizer that `AutoTokenizer` opens; case and punctuation do not matter."""
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(",", " "), normalizers.Replace(".", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build_text_encoder() -> UMT5EncoderModel:
    """A UMT5 encoder, width 128, 2 layers, 4 heads of 32."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=64,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def tokenize(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each [B, TEXT_LEN] int64: words, the end token, padding."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    rows = torch.zeros(len(prompts), TEXT_LEN, dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, prompt in enumerate(prompts):
        tokens = [ids[word] for word in prompt.split()] + [1]
        rows[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return rows, mask


def encode(encoder: UMT5EncoderModel, prompts: list[str]) -> Tensor:
    """[B, TEXT_LEN, 128] with zeros behind the end token, as Wan feeds its DiT."""
    ids, mask = tokenize(prompts)
    device = next(encoder.parameters()).device
    hidden: Tensor = encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    return hidden * mask.to(device)[..., None]
