"""How kernels are launched: programs, warps, and what the device offers."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from lightx2v.kernels.interpreter import interpreting
from lightx2v.platform import compute_capability, multiprocessors

HOPPER = (9, 0)
_INTERPRETED_PROGRAMS = 3
"""Programs of a persistent grid in the interpreter: fewer than tiles, so that the loop over them is run."""


def row_warps(block: int) -> int:
    """Warps for a program that holds `block` values: 16 or 32 for each of its threads."""
    return max(1, min(16, block // 1024))


def copies_tensors(device: torch.device) -> bool:
    """Whether tiles can come by tensor descriptors (the copy engine of compute capability 9.0): needs Triton 3.4."""
    capability = compute_capability(device)
    able = interpreting() or (capability is not None and capability >= HOPPER)
    return able and has_descriptors()


@lru_cache(maxsize=1)
def has_descriptors() -> bool:
    """Whether this Triton has tensor descriptors."""
    return hasattr(triton.language, "make_tensor_descriptor")


def persistent_programs(device: torch.device, tiles: int) -> int:
    """Programs of a grid that walks over `tiles`: one for each multiprocessor."""
    most = _INTERPRETED_PROGRAMS if device.type == "cpu" else multiprocessors(device)
    return min(tiles, most)
