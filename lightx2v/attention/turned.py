"""Attention to queries and keys whose norm and rotary embedding are still to come."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightx2v.attention.base import AttentionFn
from lightx2v.deferred import Heads, Turned, tensor_of


class TurningFn(Protocol):
    """q and k, which wait for the same rotation and the same kind of norm, and v [B, S, H, Dh] to [B, L, H, Dh]."""

    def __call__(self, q: Turned, k: Turned, v: Tensor) -> Tensor: ...


_TURNING: dict[Any, TurningFn] = {}


def turns(fn: AttentionFn, turning: TurningFn) -> None:
    """Have `turning` do what `fn` does, norms and rotations included, in fewer passes and with the same result."""
    _TURNING[fn] = turning


def attend(fn: AttentionFn, q: Heads, k: Heads, v: Tensor) -> Tensor:
    """`fn` of q, k and v."""
    turning = _TURNING.get(fn)
    if turning is not None and isinstance(q, Turned) and isinstance(k, Turned) and q.rope is k.rope and q.eps == k.eps:
        return turning(q, k, v)
    return fn(tensor_of(q), tensor_of(k), v)
