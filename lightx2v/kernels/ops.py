"""The kernels as operators of torch, with what torch.compile must know of their results."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightx2v.kernels import attention as attend
from lightx2v.kernels import attention_codes, block, gemm, quantize, tiles
from lightx2v.kernels.interpreter import mend
from lightx2v.operators import operator
from lightx2v.quant.numerics import CODE_DTYPES

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a function that launches kernels the operator `lightx2v::triton_<its name>`."""

    def wrap(function: Function) -> Function:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            mend()
            return function(*args, **kwargs)

        return operator("triton", fake)(run)  # type: ignore[return-value]

    return wrap


def _tokens_result(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=CODE_DTYPES[dtype]), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@kernel(_tokens_result)
def quantize_tokens(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K] of "int8" or "fp8" and scales [M, 1] float32."""
    return tuple(quantize.quantize_tokens(x, dtype))  # type: ignore[return-value]


def _groups_result(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    filled = -(-columns // quantize.GROUP) * quantize.GROUP
    codes = x.new_empty(rows, filled, dtype=CODE_DTYPES[dtype])
    return codes, quantize.scales_of_groups(rows, columns, x.device)


@kernel(_groups_result)
def quantize_groups(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K filled up to groups of 128] and scales [M, groups] float32, contiguous by column."""
    return tuple(quantize.quantize_groups(x, dtype))  # type: ignore[return-value]


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@kernel(_product)
def multiply_rows(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Codes a [M, K] times b [N, K] transposed, scales [M, 1] and [N, 1], bias [N] float32: [M, N] in `dtype`."""
    a, b = a.contiguous(), b.contiguous()
    key = tiles.key_of(f"{a.dtype} rows", a.shape[0], b.shape[0], a.shape[1], a.device)
    args = (a, b, a_scale.contiguous(), b_scale.contiguous(), bias, dtype)
    tile = tiles.fastest(key, tiles.candidates(a.device), lambda each: gemm.multiply_rows(*args, each), a.device)
    return gemm.multiply_rows(*args, tile)


@kernel(_product)
def multiply_blocks(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same with scales [M, K/128] and [ceil(N/128), K/128], K a multiple of 128."""
    a, b = a.contiguous(), b.contiguous()
    key = tiles.key_of(f"{a.dtype} blocks", a.shape[0], b.shape[0], a.shape[1], a.device)
    args = (a, b, a_scale, b_scale.contiguous(), bias, dtype)
    tile = tiles.fastest(
        key, tiles.block_candidates(a.device), lambda each: gemm.multiply_blocks(*args, each), a.device
    )
    return gemm.multiply_blocks(*args, tile)


def _like_first(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@kernel(_like_first)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, eight: bool) -> Tensor:
    """8-bit attention: q [B, L, H, Dh], k and v [B, S, H, Dh], Dh 64 or 128 -> [B, L, H, Dh], dense, in q's dtype.

    `eight`: P and V in e4m3, else in float16.
    """
    return _attention(attend.encode(q, k, v, eight), q, k.shape[1], scale, eight)


def _attention(
    codes: tuple[attend.Codes, attend.Codes, attend.Codes], q: Tensor, keys: int, scale: float, eight: bool
) -> Tensor:
    batch, queries, heads, dim = q.shape
    key = tiles.key_of(f"attention of {batch * heads} heads, eight {eight}", queries, keys, dim, q.device)

    def run(tile: tiles.Tile) -> Tensor:
        return attend.attend(*codes, q, keys, scale, eight, tile)

    return run(tiles.fastest(key, tiles.attention_candidates(q.device), run, q.device))


def _turn(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, eps: float
) -> attention_codes.Turn:
    spread = None if weight is None else block.rms_spread(x, weight.shape[0], eps)
    tables = (None if table is None else table.contiguous() for table in (weight, cosines, sines))
    return attention_codes.Turn(spread, *tables)


@kernel(lambda q, k, v, *_: q.new_empty(*q.shape[:2], *v.shape[2:]))
def attention_turned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    eps: float,
    scale: float,
    eight: bool,
) -> Tensor:
    """`rms_rope` of q and k [B, L, D], then `attention`, bit for bit, with neither written in between; v [B, L, H, Dh].

    The weights are float32 [D] or [Dh], cosines and sines [L, Dh / 2].
    """
    turns = (_turn(x, weight, cosines, sines, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    q, k = (x.unflatten(2, v.shape[2:]) for x in (q, k))
    return _attention(attend.encode(q, k, v, eight, *turns), q, k.shape[1], scale, eight)


def _norm(x: Tensor, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@kernel(_norm)
def layer_norm(x: Tensor, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The layer norm of float32 x [B, L, D] times `factor` plus `offset`, both float32 [D] or [B, 1, D], as `dtype`."""
    return block.norm(x, None, None, factor, offset, None, eps, dtype, None)[1]


def _norm_codes(
    x: Tensor, factor: Tensor, offset: Tensor, multiplier: Tensor | None, eps: float, dtype: torch.dtype, kind: str
) -> tuple[Tensor, Tensor]:
    return _tokens_result(x.view(-1, x.shape[-1]), kind)


@kernel(_norm_codes)
def layer_norm_codes(
    x: Tensor, factor: Tensor, offset: Tensor, multiplier: Tensor | None, eps: float, dtype: torch.dtype, kind: str
) -> tuple[Tensor, Tensor]:
    """`layer_norm` rounded to `dtype` and quantized: codes [B * L, D] of "int8" or "fp8", scales [B * L, 1].

    Where there is a float32 `multiplier` [D], of the norm times that, rounded again.
    """
    return block.norm(x, None, None, factor, offset, multiplier, eps, dtype, kind)[1:]


def _sum_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _norm(x, factor, offset, eps, dtype)


@kernel(_sum_norm)
def sum_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`add_gated` and the `layer_norm` of its result, in one pass: the float32 sum, and the norm as `dtype`."""
    return block.norm(x, y, gate, factor, offset, None, eps, dtype, None)[:2]


def _sum_norm_codes(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    factor: Tensor,
    offset: Tensor,
    multiplier: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_norm_codes(x, factor, offset, multiplier, eps, dtype, kind)


@kernel(_sum_norm_codes)
def sum_norm_codes(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    factor: Tensor,
    offset: Tensor,
    multiplier: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_gated` and the `layer_norm_codes` of its result, in one pass: sum, codes and scales."""
    return block.norm(x, y, gate, factor, offset, multiplier, eps, dtype, kind)


@kernel(lambda x, multiplier, kind: _tokens_result(x, kind))
def gelu_codes(x: Tensor, multiplier: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of x [M, K], rounded to its dtype and quantized: codes [M, K], scales [M, 1].

    Where there is a float32 `multiplier` [K], of the GELU times that, rounded again.
    """
    return tuple(quantize.quantize_tokens(x, kind, True, multiplier))  # type: ignore[return-value]


def _joined_result(x: Tensor, y: Tensor, multiplier: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return _tokens_result(x.new_empty(x.shape[0], x.shape[1] + y.shape[1]), kind)


@kernel(_joined_result)
def joined_gelu_codes(x: Tensor, y: Tensor, multiplier: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """`gelu_codes` of y [M, K] with x [M, K'] in front of the GELU: codes [M, K' + K], scales [M, 1]."""
    return tuple(quantize.quantize_tokens(y, kind, True, multiplier, x))  # type: ignore[return-value]


@kernel(torch.empty_like)
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation."""
    return block.gelu(x)


@kernel(lambda x, y, gate: torch.empty_like(x))
def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Float32 x [B, L, D] plus y [B, L, D] times a float32 gate [D] or [B, 1, D]: float32."""
    return block.add_gated(x, y, gate)


@kernel(lambda x, weight, cosines, sines, heads, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def rms_rope(
    x: Tensor, weight: Tensor | None, cosines: Tensor | None, sines: Tensor | None, heads: int, eps: float
) -> Tensor:
    """RMS norm of x [B, L, D] with a float32 weight [D] or [D / heads], then the rotary embedding of `heads` heads."""
    return block.rms_rope(x, weight, cosines, sines, heads, eps)
