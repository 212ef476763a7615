"""`triton_8bit` and `triton_8bit_fp16`: SageAttention2's scheme (arXiv 2411.10958) by this engine's own kernels.

Q and K in int8 with K smoothed; P and V in e4m3 with sums of two levels, or in float16, for GPUs without e4m3 products.
They compute what `sage_ref_int8_fp8` and `sage_ref_int8_fp16` do. No GPU has confirmed them yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightx2v.attention.base import Backend
from lightx2v.attention.hardware import NEWEST, nvidia
from lightx2v.attention.kernel import maskless
from lightx2v.attention.turned import TurningFn, turns
from lightx2v.deferred import Turned
from lightx2v.platform import install_hint, probe

if TYPE_CHECKING:
    from lightx2v.platform import DeviceInfo


@maskless("triton_8bit")
def triton_8bit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, L, H, Dh], k and v [B, S, H, Dh] -> [B, L, H, Dh]; P and V in e4m3."""
    from lightx2v.kernels import ops

    return ops.attention(q, k, v, scale, True)


@maskless("triton_8bit_fp16")
def triton_8bit_fp16(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same with P and V in float16, which holds no value beyond 65504."""
    from lightx2v.kernels import ops

    return ops.attention(q, k, v, scale, False)


def _turning(eight: bool) -> TurningFn:
    def attend(q: Turned, k: Turned, v: Tensor) -> Tensor:
        from lightx2v.kernels import ops

        cosines, sines = (None, None) if q.rope is None else (table.flatten(1) for table in q.rope)
        scale = v.shape[-1] ** -0.5
        made: Tensor = ops.attention_turned(q.x, k.x, v, q.weight, k.weight, cosines, sines, q.eps, scale, eight)
        return made

    return attend


turns(triton_8bit, _turning(True))
turns(triton_8bit_fp16, _turning(False))


def missing(device: DeviceInfo) -> str | None:
    """Why Triton's compiler cannot be used."""
    reason = probe("triton").reason
    return f"triton is {reason} ({install_hint('triton')})" if reason else None


_WIDTHS = (64, 128)
EIGHT = Backend(triton_8bit, nvidia(((8, 9), NEWEST)), missing=missing, head_dims=_WIDTHS, exact=False)
HALF = Backend(triton_8bit_fp16, nvidia(((8, 0), NEWEST)), missing=missing, head_dims=_WIDTHS, exact=False)
