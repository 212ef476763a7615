"""The normalized Hadamard rotation of groups of channels, to spread outliers (QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 4096
"""Of a rotation: beyond, it costs more than it spreads."""
_FACTOR = 64
"""Rotations are products of ones of at most this size, which are small matrix products."""
_matrices: dict[str, Tensor] = {}


def rotation_size(k: int, largest: int = LARGEST) -> int:
    """The largest power of two that divides k, at most `largest`."""
    return min(k & -k, largest)


def rotate(x: Tensor, size: int) -> Tensor:
    """x [..., K] with each `size` of its channels multiplied with a Hadamard matrix over sqrt(size), in float32.

    `size` is a power of two that divides K. The rotation is symmetric and its own inverse, so that rotating both
    factors along K leaves a product as it is.
    """
    first = min(size, _FACTOR)
    rotated = x.float().unflatten(-1, (-1, first)) @ hadamard(first, x.device)
    done = first
    while done < size:
        factor = min(size // done, _FACTOR)
        parts = rotated.flatten(-2).unflatten(-1, (-1, factor, done))
        rotated = (hadamard(factor, x.device) @ parts).flatten(-2)
        done *= factor
    return rotated.reshape(x.shape).to(x.dtype)


def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's matrix over sqrt(size), float32 [size, size]."""
    key = f"{size} {device}"  # torch.compile looks through a dictionary of strings, and not through functools' cache
    if key not in _matrices:
        with torch.inference_mode(False):
            matrix = torch.ones(1, 1, device=device)
            while len(matrix) < size:
                above = torch.cat((matrix, matrix), dim=1)
                matrix = torch.cat((above, torch.cat((matrix, -matrix), dim=1)))
            _matrices[key] = matrix / size**0.5
    return _matrices[key]
