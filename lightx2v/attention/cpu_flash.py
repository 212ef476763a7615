"""`cpu_flash`: flash attention in bfloat16 on CPUs, by a compiled kernel around oneDNN's block products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightx2v.attention.base import Backend
from lightx2v.attention.kernel import maskless

if TYPE_CHECKING:
    from lightx2v.platform import DeviceInfo


@maskless("cpu_flash")
def cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh]."""
    from lightx2v.native import ops

    return ops.attention(q, k, v, scale)


def needs(device: DeviceInfo) -> str | None:
    return None if device.kind == "cpu" else "a CPU"


def missing(device: DeviceInfo) -> str | None:
    from lightx2v.native.build import kernels

    return kernels().lacks("bfloat16")


BACKEND = Backend(cpu_flash, needs, missing=missing, dtypes=frozenset({"bfloat16"}))
