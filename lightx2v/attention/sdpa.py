"""`torch_sdpa`: torch's own scaled dot-product attention, on every device. The reference for the other backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightx2v.attention.base import Backend

if TYPE_CHECKING:
    from lightx2v.platform import DeviceInfo


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def available(device: DeviceInfo) -> str | None:
    return None


BACKEND = Backend(torch_sdpa, available)
