"""The compiled kernels as functions of tensors. Check `kernels()` first: these assume that the library is there.

Tensors are bfloat16 or float32, on the CPU, and get no gradients.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightx2v.native.build import kernels
from lightx2v.operators import operator

DTYPES = (torch.bfloat16, torch.float32)

_SIZE, _POINTER, _FLAG, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_LINEAR = [_POINTER, _POINTER, _SIZE, _POINTER, *[_SIZE] * 4, _FLAG, _FLAG]
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "lx_linear_int8": ([*_LINEAR, *[_POINTER] * 4], ctypes.c_bool),
    "lx_linear_fp8": ([*_LINEAR, *[_POINTER] * 3], ctypes.c_bool),
    "lx_linear_fp8_block": ([*_LINEAR, *[_POINTER] * 3], ctypes.c_bool),
    "lx_linear_weight_only": (
        [_POINTER, _SIZE, _POINTER, *[_SIZE] * 4, _FLAG, _FLAG, *[_POINTER] * 4, _SIZE, _FLAG],
        ctypes.c_bool,
    ),
    "lx_attention": ([*[_POINTER] * 7, *[_SIZE] * 5, _FLOAT], ctypes.c_bool),
    "lx_layer_norm": ([*[_POINTER] * 4, *[_SIZE] * 4, _FLOAT, _FLAG], None),
    "lx_rms_rope": ([_POINTER, _SIZE, *[_POINTER] * 4, *[_SIZE] * 5, _FLOAT, _FLAG], None),
    "lx_add_gated": ([*[_POINTER] * 4, *[_SIZE] * 4, _FLAG], None),
    "lx_gelu_tanh": ([*[_POINTER] * 2, _SIZE, _FLAG], None),
}


@lru_cache(maxsize=len(_SIGNATURES))
def _kernel(name: str) -> Any:
    function = getattr(kernels().library, name)
    function.argtypes, function.restype = _SIGNATURES[name]
    return function


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _linear_result(kind: str, x: Tensor, x_scale: Tensor | None, n: int, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], n, dtype=x.dtype if x_scale is None else torch.float32)


@operator("cpu", _linear_result)
def linear(
    kind: str,
    x: Tensor,
    x_scale: Tensor | None,
    n: int,
    k: int,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    gelu: bool,
) -> Tensor:
    """x [M, k] times a packed weight of `kind` int8, fp8 or fp8_block: [M, n] in the dtype of x.

    With `x_scale`, float32 [M, groups], x holds codes, and the result is float32. `weight` [panels, K/p, 64, p],
    `scale` and `shift` are as `mm.onednn` packs them; bias is float32 [n]. `gelu` adds a GELU (tanh) at the end.
    Raises RuntimeError when oneDNN refuses.
    """
    x = _dense_rows(x)
    y = _linear_result(kind, x, x_scale, n)
    source = 2 if x_scale is not None else int(x.dtype == torch.float32)
    sizes = (x.shape[0], n, k, weight.shape[1] * weight.shape[3])
    tensors = [bias, scale, weight, *([shift] if kind == "int8" else [])]
    worked = _kernel(f"lx_linear_{kind}")(
        _at(x), _at(x_scale), x.stride(0), _at(y), *sizes, source, gelu, *map(_at, tensors)
    )
    if not worked:
        raise RuntimeError("oneDNN refused a product of codes")
    return y


@operator("cpu", lambda bits, x, n, *_: x.new_empty(x.shape[0], n))
def weight_only(
    bits: int,
    x: Tensor,
    n: int,
    k: int,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    bias: Tensor | None,
    gelu: bool,
) -> Tensor:
    """x [M, k] times a weight packed by `mm.onednn_weights`: [M, n] in the dtype of x. float32 x keeps 16 bits of each.

    `weight` uint8 [panels, K/2, bytes] has codes of 8, 4 or 2 `bits`, or e4m3 (0). `scale` and `zero` are float32
    [panels, groups, 64] for groups of `group` input channels, `scale` [n] and `zero` [panels, 1, 64] for whole rows
    (0); bias is float32 [n]. `gelu` adds a GELU (tanh) at the end. Raises RuntimeError when oneDNN refuses.
    """
    x = _dense_rows(x)
    y = x.new_empty(x.shape[0], n)
    sizes = (x.shape[0], n, k, weight.shape[1] * 2)
    worked = _kernel("lx_linear_weight_only")(
        *(_at(x), x.stride(0), _at(y), *sizes, x.dtype == torch.float32, gelu),
        *(*map(_at, (bias, scale, weight, zero)), group, bits),
    )
    if not worked:
        raise RuntimeError("oneDNN refused a product of a weight's codes")
    return y


@operator("cpu", lambda q, k, v, scale: torch.empty(q.shape, dtype=q.dtype, device=q.device))
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, L, H, D], k and v [B, S, H, D], all bfloat16 -> [B, L, H, D]."""
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    batch, queries, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    strides = [(_SIZE * 3)(*t.stride()[:3]) for t in (q, k, v)]
    inputs = [p for t, s in zip((q, k, v), strides, strict=True) for p in (_at(t), ctypes.addressof(s))]
    if not _kernel("lx_attention")(*inputs, _at(out), batch, heads, queries, k.shape[1], dim, scale):
        raise RuntimeError("oneDNN refused a product of attention")
    return out


@operator("cpu", lambda x, factor, offset, eps, dtype: torch.empty(x.shape, dtype=dtype, device=x.device))
def layer_norm(x: Tensor, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The layer norm of float32 x [B, L, D] times `factor` plus `offset`, both float32 [D] or [B, 1, D], as `dtype`."""
    x, factor, offset = x.contiguous(), factor.contiguous(), offset.contiguous()
    width = x.shape[-1]
    rows, batches = x.numel() // width, factor.numel() // width
    y = torch.empty(x.shape, dtype=dtype)
    sizes = (rows, width, rows // batches, width if batches > 1 else 0)
    _kernel("lx_layer_norm")(*map(_at, (x, factor, offset, y)), *sizes, eps, dtype == torch.float32)
    return y


@operator("cpu", lambda x, weight, cosines, sines, heads, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def rms_rope(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, heads: int, eps: float
) -> Tensor:
    """RMS norm of x [B, L, D] with a float32 weight, then the rotary embedding of `heads` heads; dense.

    With a weight [D] the norm is over D, with one of [D / heads] that of each head. Without `weight` no norm, without
    `cosines` and `sines` (float32 [L, D / heads / 2]) no rotation.
    """
    batch, tokens, width = x.shape
    if x.stride(2) != 1 or (batch > 1 and x.stride(0) != tokens * x.stride(1)):
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    tables = [None if table is None else table.contiguous() for table in (weight, cosines, sines)]
    sizes = (batch * tokens, tokens, heads, width // heads, width if weight is None else weight.shape[0])
    _kernel("lx_rms_rope")(_at(x), x.stride(1), *map(_at, tables), _at(y), *sizes, eps, x.dtype == torch.float32)
    return y


@operator("cpu", lambda x, y, gate: torch.empty_like(x))
def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Float32 x [B, L, D] plus y [B, L, D] times a float32 gate [D] or [B, 1, D]: float32."""
    x, y = x.contiguous(), y.contiguous()
    gate = None if gate is None else gate.contiguous()
    width = x.shape[-1]
    rows, batches = x.numel() // width, 1 if gate is None else gate.numel() // width
    out = torch.empty_like(x)
    sizes = (rows, width, rows // batches, width if batches > 1 else 0)
    _kernel("lx_add_gated")(*map(_at, (x, y, gate, out)), *sizes, y.dtype == torch.float32)
    return out


@operator("cpu", torch.empty_like)
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _kernel("lx_gelu_tanh")(_at(x), _at(y), x.numel(), x.dtype == torch.float32)
    return y
