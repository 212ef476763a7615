"""What lies between a model's call and a kernel that knows no masks: scale, masks of keys, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightx2v.attention.base import AttentionFn
from lightx2v.errors import LightX2VError

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Attention without a mask: q [B, L, H, Dh], k and v [B, S, H, Dh], scale -> [B, L, H, Dh] in q's dtype."""


def maskless(name: str) -> Callable[[Kernel], AttentionFn]:
    """Make a kernel without masks the AttentionFn of backend `name`.

    Masks of keys are served by leaving those keys out, which is exact. Any other is a LightX2VError, never ignored.
    """

    def wrap(kernel: Kernel) -> AttentionFn:
        run = as_operator(name, kernel)

        @wraps(kernel)
        def attend(
            q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
        ) -> Tensor:
            return without_masked(name, run, q, k, v, mask, scale)

        return attend

    return wrap


def without_masked(
    name: str, run: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """What `run` gives without the keys that `mask` leaves out, for backend `name`: what `maskless` calls."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None:
        return run(q, k, v, scale)
    return _with_keys(run, q, k, v, scale, kept_keys(name, mask, k.shape[0]))


def as_operator(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, which gives a tensor of the shape of its first argument, as torch.compile keeps it whole.

    Outside of a compilation the function itself is called.
    """

    def dense(*args: Any) -> Tensor:
        return function(*args).contiguous()  # as the fake says

    def fake(*args: Any) -> Tensor:
        return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)

    schema = torch.library.infer_schema(function, mutates_args=())
    operator = torch.library.custom_op(f"lightx2v::{name}", dense, mutates_args=(), schema=schema)
    operator.register_fake(fake)

    def call(*args: Any) -> Tensor:
        result: Tensor = operator(*args) if torch.compiler.is_compiling() else function(*args)
        return result

    return call


Keys = int | Tensor
"""Keys that count: so many from the first, or their indices."""

_kept: Any = WeakTensorKeyDictionary()
"""What masks keep, by mask: reading one waits for the device, and a model has the same in every block."""


def kept_keys(name: str, mask: Tensor, batch: int) -> tuple[Keys, ...]:
    """The keys that a mask which is the same for all queries and heads keeps, for each of `batch` samples.

    Raises LightX2VError, for backend `name`, where it is not such a mask.
    """
    known: tuple[Keys, ...] | None = _kept.get(mask)
    if known is None:
        known = _kept[mask] = _read(name, mask)
    return known * batch if len(known) == 1 else known


def _read(name: str, mask: Tensor) -> tuple[Keys, ...]:
    keys = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    for dim in (1, 2):  # an expanded dimension is as good as one of size 1
        keys = keys.narrow(dim, 0, 1) if keys.stride(dim) == 0 else keys
    if keys.shape[1:3] != (1, 1):
        raise LightX2VError(
            name,
            f"this attention backend takes masks of keys, [B, 1, 1, S], and got one of shape {list(mask.shape)}",
            do="set attention.type to torch_sdpa",
        )
    kept: list[Keys] = []
    for row in keys[:, 0, 0].cpu():
        count = int(row.sum())
        kept.append(count if bool(row[:count].all()) else row.nonzero()[:, 0].to(mask.device))
    return tuple(kept)


def _with_keys(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, kept: tuple[Keys, ...]
) -> Tensor:
    first = kept[0]
    if all(keys is first or (isinstance(keys, int) and isinstance(first, int) and keys == first) for keys in kept):
        return _one(run, q, k, v, scale, first)
    return torch.cat([_one(run, q[i : i + 1], k[i : i + 1], v[i : i + 1], scale, keys) for i, keys in enumerate(kept)])


def _one(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, keys: Keys) -> Tensor:
    if isinstance(keys, Tensor):
        return run(q, k[:, keys], v[:, keys], scale)
    if keys == 0:  # as torch has it: what looks at nothing is zero
        return torch.zeros_like(q)
    return run(q, k[:, :keys], v[:, :keys], scale)
