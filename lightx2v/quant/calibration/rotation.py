"""Signs for rotations, and what a multiplier and a rotation of the input do to things that were found of the input.

The input of a quantized linear is rotate(x * multiplier, size), `rotate` of `quant.hadamard`, and its weight
rotate(W / multiplier, size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.quant.hadamard import rotate

SHARED_SEED = 1234
"""Of msModelSlim's rotations."""


def random_signs(k: int, seed: int = SHARED_SEED) -> Tensor:
    """float32 [k] of 1 and -1, for a randomized Hadamard rotation (QuIP#, arXiv 2402.04396).

    Times the multiplier they need no place of their own: rotate(x * (m * signs)) rotates x * m by diag(signs) H.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (k,), generator=generator).float() * 2 - 1


def fold_down(down: Tensor, multiplier: Tensor | None = None, size: int = 0) -> Tensor:
    """The factor [R, K] for x itself of one, `down` [R, K], that was found for rotate(x * multiplier, size).

    The low-rank branch of a layer takes the input itself (`quant.around`).
    """
    if size:
        down = rotate(down, size)
    return down if multiplier is None else down * multiplier


def fold_gram(gram: Tensor, multiplier: Tensor | None = None, size: int = 0) -> Tensor:
    """The sum [K, K] of x'^T x' of x' = rotate(x * multiplier, size), from that of x^T x."""
    if multiplier is not None:
        gram = gram * multiplier * multiplier[:, None]
    return rotate(rotate(gram, size).T, size).T.contiguous() if size else gram
