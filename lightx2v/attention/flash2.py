"""`flash_attn2`: FlashAttention-2 (arXiv 2307.08691), package `flash-attn`."""

from __future__ import annotations

from torch import Tensor

from lightx2v.attention.base import Backend, refuse_mask
from lightx2v.platform import DeviceInfo, install_hint, probe


def flash_attn2(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh], float16 or bfloat16 -> [B, L, H, Dh]."""
    from flash_attn import flash_attn_func

    refuse_mask("flash_attn2", mask)
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale)
    return out


def available(device: DeviceInfo) -> str | None:
    if device.capability is None and device.kind != "rocm":
        return f"needs an NVIDIA or AMD GPU, the device is {device.torch_name}"
    if device.capability is not None and device.capability < (8, 0):
        return f"needs compute capability 8.0 or more, {device.name} has {device.capability[0]}.{device.capability[1]}"
    reason = probe("flash_attn").reason
    return reason and f"{reason} ({install_hint('flash_attn')})"


BACKEND = Backend(flash_attn2, available, frozenset({"bfloat16", "float16"}))
