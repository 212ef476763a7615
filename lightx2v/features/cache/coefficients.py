"""Published coefficients and ratios: what `assets/cache_coefficients.json` has, and which entry is for a checkpoint.

In that file an entry is one model. What it leaves out fits any model, or was not published; `pixels` are those of a
request, at least and less than; one list of ratios serves both branches; `source` is the project that measured it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightx2v.features.cache.facts import Facts
from lightx2v.models.base import Branch

FILE = Path(__file__).parents[2] / "assets" / "cache_coefficients.json"

Ratios = Mapping[Branch, tuple[float, ...]]
"""Of MagCache, for each branch one a step, the first 1."""


@dataclass(frozen=True)
class Published:
    """What is known of one model. What was not published is empty."""

    name: str
    family: str
    tasks: tuple[str, ...]
    source: str
    width: int | None = None
    blocks: int | None = None
    variants: tuple[str, ...] = ()
    """Empty: any."""
    pixels: tuple[int, int | None] = (0, None)
    """Of requests that this checkpoint was made for: at least, and less than."""
    head: tuple[float, ...] = ()
    """TeaCache's polynomial for the signal without `use_ret_steps`, or for the only signal there is; the coefficient of
    the highest degree first."""
    blocks_signal: tuple[float, ...] = ()
    """The same for the signal with `use_ret_steps`."""
    ratios: Ratios = field(default_factory=dict)

    def fits(self, facts: Facts) -> bool:
        """Whether a request with such a model is one with this model."""
        least, below = self.pixels
        return (
            facts.family == self.family
            and facts.task in self.tasks
            and self.width in (None, facts.width)
            and self.blocks in (None, facts.blocks)
            and (not self.variants or facts.variant in self.variants)
            and least <= facts.pixels
            and (below is None or facts.pixels < below)
        )


def lookup(facts: Facts) -> Published | None:
    """The published numbers of the model that `facts` describe, if there are any: the first entry that fits."""
    return next((model for model in published() if model.fits(facts)), None)


@lru_cache(maxsize=1)
def published() -> tuple[Published, ...]:
    """All entries of the file, in its order."""
    return tuple(_entry(**entry) for entry in json.loads(FILE.read_text("utf-8")))


def _entry(ratios: Any = (), **values: Any) -> Published:
    by_branch = ratios if isinstance(ratios, dict) else dict.fromkeys(("cond", "uncond"), ratios) if ratios else {}
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Published(**lists, ratios={branch: tuple(numbers) for branch, numbers in by_branch.items()})
