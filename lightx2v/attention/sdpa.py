"""`torch_sdpa`: torch's own scaled dot-product attention, on every device. The reference for the other backends.

`torch_sdpa_flash`, `_cudnn`, `_efficient` and `_math` are the same with one kernel named; torch raises where it cannot
run the call with that one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lightx2v.attention.base import HALVES, AttentionFn, Backend
from lightx2v.attention.hardware import NEWEST, nvidia
from lightx2v.attention.kernel import maskless

if TYPE_CHECKING:
    from lightx2v.platform import DeviceInfo


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def with_kernel(kernel: SDPBackend) -> AttentionFn:
    """`torch_sdpa` by this kernel alone."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return torch_sdpa(q, k, v, mask=mask, scale=scale)

    return attend


@maskless("torch_sdpa_flash")
def torch_sdpa_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return with_kernel(SDPBackend.FLASH_ATTENTION)(q, k, v, scale=scale)


def _flash_needs(device: DeviceInfo) -> str | None:
    return None if device.kind == "cpu" else nvidia(((8, 0), NEWEST), amd=True)(device)


BACKEND = Backend(torch_sdpa, masks=True)
#: CPUs have it in float32 too, but the halves are all that it takes on a GPU.
FLASH = Backend(torch_sdpa_flash, _flash_needs, dtypes=HALVES, head_dims=range(1, 257))
CUDNN = Backend(
    with_kernel(SDPBackend.CUDNN_ATTENTION),
    nvidia(((8, 0), NEWEST)),
    dtypes=HALVES,
    head_dims=range(8, 129, 8),
    masks=True,
)
EFFICIENT = Backend(with_kernel(SDPBackend.EFFICIENT_ATTENTION), nvidia(((5, 0), NEWEST), amd=True), masks=True)
MATH = Backend(with_kernel(SDPBackend.MATH), masks=True)
