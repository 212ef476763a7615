"""What is reused between steps, extrapolated by a Taylor series where that is asked for.

TaylorSeer (Liu et al. 2025, arXiv 2503.06923): the derivatives of a feature with respect to the step are estimated by
backward differences over the computed steps, D0 = F and Di+1 = (Di - Di of the computed step before) / steps between
them, and k steps later the feature is taken for the sum of Di k^i / i!. Order 0 reuses the feature as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightx2v.features.cache.store import Store
from lightx2v.models.base import Branch, Stream

Parts = tuple[Tensor, Tensor | None]
"""x and txt of a stream."""


def residual(after: Stream, before: Stream) -> Parts:
    """What blocks have added to a stream."""
    txt = None if after.txt is None or before.txt is None else after.txt - before.txt
    return after.x - before.x, txt


def added(stream: Stream, parts: Parts) -> Stream:
    """The stream with what blocks would add to it."""
    x, txt = parts
    return Stream(stream.x + x, stream.txt if stream.txt is None or txt is None else stream.txt + txt)


class Series:
    """The residual of one branch, from its computed steps to any later one."""

    def __init__(self, store: Store, branch: Branch, order: int = 0) -> None:
        self._store, self._branch, self._order = store, branch, order
        self._last: int | None = None
        self._terms = 0

    @property
    def last(self) -> int | None:
        """The step that was computed last."""
        return self._last

    @property
    def empty(self) -> bool:
        """Whether there is nothing to reuse."""
        return self._last is None

    def update(self, step: int, value: Parts) -> None:
        """The residual that `step` has computed."""
        terms = [value]
        if self._last is not None:
            distance = step - self._last
            for order in range(min(self._order, self._terms)):
                before = self._store.get((self._branch, order))
                terms.append(_each(terms[order], before, lambda new, old: (new - old) / distance))
        for order, term in enumerate(terms):
            self._store.put((self._branch, order), term)
        self._last, self._terms = step, len(terms)

    def at(self, step: int) -> Parts:
        """The residual that `step` would compute."""
        assert self._last is not None
        ahead = step - self._last
        total: Parts = self._store.get((self._branch, 0))
        for order in range(1, self._terms):
            factor = ahead**order / math.factorial(order)
            term = self._store.get((self._branch, order))
            total = _each(total, term, partial(torch.add, alpha=factor))
        return total


def _each(first: Parts, second: Parts, combine: Callable[[Tensor, Tensor], Tensor]) -> Parts:
    (x, txt), (other_x, other_txt) = first, second
    if txt is None or other_txt is None:
        return combine(x, other_x), None
    return combine(x, other_x), combine(txt, other_txt)
