"""`cpu_flash`: flash attention in bfloat16 on CPUs, by a compiled kernel around oneDNN's block products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightx2v.attention.base import Backend, refuse_mask

if TYPE_CHECKING:
    from lightx2v.platform import DeviceInfo


def cpu_flash(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh]."""
    from lightx2v.native import ops

    refuse_mask("cpu_flash", mask)
    return ops.attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def available(device: DeviceInfo) -> str | None:
    if device.kind != "cpu":
        return "computes on CPUs"
    from lightx2v.native.build import kernels

    return kernels().lacks("bfloat16")


BACKEND = Backend(cpu_flash, available, dtypes=frozenset({"bfloat16"}))
