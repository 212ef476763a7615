"""`flash_attn3`: FlashAttention-3 (arXiv 2407.08608) for Hopper GPUs, module `flash_attn_interface`."""

from __future__ import annotations

from torch import Tensor

from lightx2v.attention.base import Backend, refuse_mask
from lightx2v.platform import DeviceInfo, install_hint, probe


def flash_attn3(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh], float16 or bfloat16 -> [B, L, H, Dh]."""
    from flash_attn_interface import flash_attn_func

    refuse_mask("flash_attn3", mask)
    result = flash_attn_func(q, k, v, softmax_scale=scale)
    out: Tensor = result[0] if isinstance(result, tuple) else result  # releases before 2026 also return the log-sum-exp
    return out


def available(device: DeviceInfo) -> str | None:
    if device.capability is None or device.capability[0] != 9:
        return f"needs an NVIDIA Hopper GPU (compute capability 9.0), the device is {device.name}"
    reason = probe("flash_attn_interface").reason
    return reason and f"{reason} ({install_hint('flash_attn_interface')})"


BACKEND = Backend(flash_attn3, available, frozenset({"bfloat16", "float16"}))
