"""SVDQuant (arXiv 2411.05007): a weight as a product of rank r in 16 bits and a rest that is easier to quantize.

N output channels, K input channels; W = up @ down + residual. Factors and rest are found in turns: the factors of what
the codes of the rest miss, the rest of what the factors miss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_OVERSAMPLING = 16
"""Directions beyond the rank that a randomized decomposition keeps."""
_EXACT_SIZE = 512
"""Up to this many rows or columns the decomposition is not randomized."""


class LowRank(NamedTuple):
    """down float32 [R, K], up [N, R], residual [N, K] = W - up @ down, and the relative error after each turn."""

    down: Tensor
    up: Tensor
    residual: Tensor
    errors: tuple[float, ...]


def decompose(
    weight: Tensor,
    rank: int,
    fake_quantize: Callable[[Tensor], Tensor],
    *,
    rows: Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> LowRank:
    """Factors of rank at most `rank` of a weight [N, K] whose rest has the smallest error as codes.

    `fake_quantize` gives what the codes of a rest stand for. The error is the rest's less those, as a share of the
    weight's size: of all values (Frobenius), or of the outputs for `rows` [M, K] of inputs. It ends, with the best
    found, when a turn improves the error by less than the share `tolerance`, and after `iterations` turns.
    """
    weight = weight.float()

    def size(matrix: Tensor) -> float:
        return float((matrix if rows is None else matrix @ rows.T.float()).norm())

    whole = size(weight) or 1.0
    target, start = weight, None
    best: tuple[Tensor, Tensor] | None = None
    errors: list[float] = []
    for _ in range(iterations):
        down, up = truncated_svd(target, rank, seed=seed, power_iterations=2 if start is None else 1, start=start)
        residual = weight - up @ down
        rounded = fake_quantize(residual)
        error = size(residual - rounded) / whole
        if best is None or error < min(errors):
            best = (down, up)
        errors.append(error)
        if len(errors) > 1 and error >= (1 - tolerance) * errors[-2]:
            break
        target, start = weight - rounded, down
    if best is None:
        raise ValueError("a decomposition takes at least one turn")
    down, up = best
    return LowRank(down, up, weight - up @ down, tuple(errors))


def truncated_svd(
    matrix: Tensor, rank: int, *, seed: int = 0, power_iterations: int = 2, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(down [R, K], up [N, R]) with the best approximation up @ down of rank R = min(rank, N, K) of a matrix [N, K].

    Large matrices by random directions and power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061), from a
    generator of the seed; `start` [R, K] holds rows to begin with instead, of an earlier and similar matrix.
    """
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(_EXACT_SIZE, 2 * rank):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return right[:rank].contiguous(), left[:, :rank] * values[:rank]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=generator).to(matrix.device)
    if start is not None:
        directions[:, : len(start)] = start.T
    for _ in range(max(1, power_iterations)):
        directions = _orthonormal(matrix.T @ _orthonormal(matrix @ directions))
    images = matrix @ directions
    # The right singular vectors of the images, by their small gram matrix in float64.
    _, vectors = torch.linalg.eigh(images.double().T @ images.double())
    vectors = vectors[:, -rank:].flip(1).float()
    return (directions @ vectors).T.contiguous(), images @ vectors


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
