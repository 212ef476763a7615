"""Prompts to tokens, by transformers' tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loguru import logger
from torch import Tensor
from transformers import AutoTokenizer

from lightx2v.errors import CheckpointError


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in `folder`; `name` is that of the folder in the published model. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(str(folder), "the tokenizer folder is missing", do=f"copy the model's {name}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(folder), f"no tokenizer could be read here: {error}") from error


def tokenize(tokenizer: Any, texts: list[str], text_len: int, warn: bool = True) -> tuple[Tensor, Tensor]:
    """Token numbers [B, text_len], padded at the end, and True [B, text_len] for those that are no padding.

    What is longer is cut, with a warning.
    """
    tokens = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=text_len,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask.bool()
    for text, full in zip(texts, mask.all(dim=1).tolist(), strict=True):
        if warn and full and (length := len(tokenizer(text).input_ids)) > text_len:
            logger.warning("the prompt has {} tokens, only the first {} count: {}...", length, text_len, text[:40])
    return tokens.input_ids, mask
