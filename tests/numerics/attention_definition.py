"""Scaled dot-product attention by its definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh]; a boolean mask broadcasts to [B, H, L, S]."""
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v.double())
