"""ComfyUI's words about a quantized file: a `comfy_quant` tensor for each layer, or a list of them in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint

_KEY = "_quantization_metadata"
LEAF = "comfy_quant"


def _listed(checkpoint: Checkpoint) -> dict[str, bytes]:
    text = checkpoint.metadata.get(_KEY)
    if text is None:
        return {}
    try:
        layers: dict[str, Any] = json.loads(text)["layers"]
        return {f"{layer}.{LEAF}": json.dumps(said).encode() for layer, said in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(checkpoint.path), f"its metadata '{_KEY}' is no list of layers: {error!r}") from error


def comfy_marks(checkpoint: Checkpoint) -> dict[str, int]:
    """Names and bytes of the marks that the metadata stands for, besides those that are tensors of the file."""
    return {name: len(text) for name, text in _listed(checkpoint).items() if name not in checkpoint.tensors}


def stream_marks(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The marks that the metadata stands for as the tensors that they would be, uint8 [bytes]."""
    for name, text in _listed(checkpoint).items():
        if name not in checkpoint.tensors:
            yield name, torch.tensor(list(text), dtype=torch.uint8)
