"""Which linear layers of a model that this package did not write `mm_type` applies to."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

_KEPT = re.compile(r"norm|embed|time|modulation|adaln|_mod$|^mod$|^gate$|router", re.IGNORECASE)
"""Components of names of layers that see one vector a sample, or decide more than they cost: they stay as they are."""


SENSITIVE = ("*.net.2", "*.ffn.2", "*.fc2", "*.linear_2", "*.proj_out", "*blocks.0.*")
"""Globs of layers that lose most with fewer than 8 bits: the second of a feed-forward, and first blocks (msModelSlim's
and SVDQuant's lists)."""


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that `model` repeats: what its class of diffusers calls so, or what is in a ModuleList."""
    names: Collection[str] = getattr(model, "_repeated_blocks", None) or ()
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in names]
    if not blocks:
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        blocks = [f"{name}.{index}" for name, entries in lists for index in range(len(entries))]
    outer = set(blocks)
    return [name for name in blocks if not outer & set(_parents(name))]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def quantizable(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of the linears inside the repeated blocks of `model`, by full name; norms, embedders and the like stay."""
    prefixes = tuple(f"{name}." for name in repeated_blocks(model))
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and name.startswith(prefixes) and not any(map(_KEPT.search, name.split(".")))
    }
