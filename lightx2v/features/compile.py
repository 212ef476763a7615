"""`compile: true`: torch.compile for what each block of a DiT computes. All blocks share one compiled graph."""

from __future__ import annotations

from typing import Any

import torch

from lightx2v.models.base import DiT
from lightx2v.native.build import kernels


def compile_blocks(model: DiT) -> None:
    """Compile `compute` of every block: the innermost wrapper, so that features outside see plain blocks.

    A block's `compute` takes and gives tensors only, and parameters are inputs of the graph, so one compilation serves
    all blocks of a shape.
    """
    kernels()  # found out before tracing, which would follow the search for a compiler
    for block in model.blocks:
        whole: Any = block
        whole.compute = torch.compile(whole.compute)
