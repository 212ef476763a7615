"""What a cache is chosen and checked by, known before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Facts:
    """A model and a request. `Facts.of` reads what the model itself can say."""

    family: str
    """Its `model_cls`."""
    task: str
    width: int
    """Of the stream of tokens, D."""
    blocks: int
    pixels: int
    """Height times width of the request."""
    variant: str = ""
    """The family's name for this kind of checkpoint, where it has several."""
    time_signal: bool = False
    """`DiT.time_signal`."""
    recallable: frozenset[str] = frozenset()
    """The kinds of submodules that the blocks offer for recalling."""
    cfg: bool = True
    """Whether the unconditional branch runs."""
    dtype: torch.dtype = torch.float32
    """What the model computes in."""

    @staticmethod
    def of(model: Any, **known: Any) -> Facts:
        """`known`, and what `model`, a DiT that may be on meta, tells of itself."""
        offered: list[Mapping[str, Any]] = [getattr(type(block), "recallable", {}) for block in model.blocks]
        return Facts(
            blocks=len(offered),
            time_signal=model.time_signal,
            recallable=frozenset(kind for kinds in offered for kind in kinds),
            **known,
        )

    def __str__(self) -> str:
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.family}{variant} {self.task}, width {self.width}, {self.blocks} blocks"
