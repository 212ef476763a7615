"""Activations quantized by vendors' kernels: `act_library` of a scheme names one, and any adapter may use it.

Interfaces are those of vLLM 0.6 to 0.33, sgl-kernel 0.1 to 0.3 and sglang-kernel 0.4, and torchao 0.8 to 0.19;
`tests/contracts` holds what is relied on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightx2v.mm.scheme import Scheme
from lightx2v.quant.numerics import FP8_MAX, Quantized
from lightx2v.vendor import Function

_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
_ROW_ALIGNMENT = 4
"""float32 scales that make up the 16 bytes which the tensor memory accelerator of compute capability 9.0 aligns to."""


@dataclass(frozen=True)
class _Quantizer:
    """How one library quantizes activations [M, K]; `optional` where torch does when it is missing."""

    function: Function
    call: Callable[[Callable[..., Any], Tensor], Quantized]
    dtypes: frozenset[torch.dtype] = _FLOATS
    optional: bool = False
    gpu: bool = False
    """Whether it is for GPUs alone; torch gives the same codes elsewhere."""


def column_major(rows: int, columns: int, device: torch.device) -> Tensor:
    """Uninitialized float32 [rows, columns], each column contiguous and 16-byte aligned."""
    aligned = -(-rows // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    return torch.empty_strided((rows, columns), (1, aligned), dtype=torch.float32, device=device)


def _vllm_fp8(function: Callable[..., Any], x: Tensor) -> Quantized:
    codes, scale = function(x, use_per_token_if_dynamic=True)
    return Quantized(codes, scale)


def _pair(function: Callable[..., Any], x: Tensor) -> Quantized:
    """For functions of x alone that give codes, scales and perhaps a zero point that symmetric codes lack."""
    codes, scale = function(x)[:2]
    return Quantized(codes, scale.float().view(-1, 1))


def _own(dtype: str) -> Callable[[Callable[..., Any], Tensor], Quantized]:
    return lambda function, x: Quantized(*function(x, dtype))


def _sgl_fp8(function: Callable[..., Any], x: Tensor) -> Quantized:
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    function(x, codes, scale)
    return Quantized(codes, scale)


def _sgl_groups(function: Callable[..., Any], x: Tensor) -> Quantized:
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = column_major(x.shape[0], x.shape[1] // 128, x.device)
    function(x, codes, scale, group_size=128, eps=1e-10, fp8_min=-FP8_MAX, fp8_max=FP8_MAX)
    return Quantized(codes, scale)


_OWN = "lightx2v.kernels.ops:"
_QUANTIZERS: dict[tuple[str, str, str], _Quantizer] = {
    ("vllm", "fp8", "token"): _Quantizer(
        Function(("vllm._custom_ops:scaled_fp8_quant",), ("input",), ("use_per_token_if_dynamic",)), _vllm_fp8
    ),
    ("vllm", "int8", "token"): _Quantizer(Function(("vllm._custom_ops:scaled_int8_quant",), ("input",)), _pair),
    ("sgl", "fp8", "token"): _Quantizer(
        Function(("sgl_kernel:sgl_per_token_quant_fp8",), ("input", "output_q", "output_s")), _sgl_fp8
    ),
    # The kernels package has none for int8 tokens, the engine around it has.
    ("sgl", "int8", "token"): _Quantizer(
        Function(("sglang.srt.layers.quantization.int8_kernel:per_token_quant_int8",), ("x",)), _pair, optional=True
    ),
    ("sgl", "fp8", "group"): _Quantizer(
        Function(
            ("sgl_kernel:sgl_per_token_group_quant_fp8", "sgl_kernel:sgl_per_token_group_quant_8bit"),
            ("input", "output_q", "output_s"),
            ("group_size", "eps", "fp8_min", "fp8_max"),
            # The second kernel divides otherwise, and choosing it by itself imports the engine in some versions.
            (("scale_ue8m0", False), ("enable_v2", False)),
        ),
        _sgl_groups,
        frozenset({torch.float16, torch.bfloat16}),
    ),
    ("torchao", "int8", "token"): _Quantizer(
        Function(
            (
                "torchao.quantization.utils:_quantize_activation_per_token_absmax",
                "torchao.quantization.utils:quantize_activation_per_token_absmax",
            ),
            ("t",),
        ),
        _pair,
    ),
    **{
        ("triton", dtype, granularity): _Quantizer(
            Function((_OWN + name,), ("x", "dtype")), _own(dtype), optional=True, gpu=True
        )
        for dtype, granularity, name in (
            ("int8", "token", "quantize_tokens"),
            ("fp8", "token", "quantize_tokens"),
            ("fp8", "group", "quantize_groups"),
        )
    },
}


def _quantizer(scheme: Scheme) -> _Quantizer | None:
    spec = scheme.activation
    return _QUANTIZERS.get((scheme.act_library, spec.dtype, spec.granularity)) if spec else None


def quantizer_missing(scheme: Scheme) -> str | None:
    """Why the library that the scheme names cannot quantize its activations; None also where torch does it."""
    quantizer = _quantizer(scheme)
    reason = None if quantizer is None or quantizer.optional else quantizer.function.find().reason
    return f"activations are quantized by {scheme.act_library}: {reason}" if reason else None


def vendor_quantize(scheme: Scheme, x: Tensor) -> Quantized | None:
    """x [M, K] quantized by the kernel of the scheme's `act_library`; None where torch has to do it.

    That is for libraries without such a kernel, and for dtypes and devices that theirs does not take.
    """
    quantizer = _quantizer(scheme)
    if quantizer is None or x.dtype not in quantizer.dtypes or (quantizer.gpu and x.device.type == "cpu"):
        return None
    function = quantizer.function.find()
    return None if function.value is None else quantizer.call(function.value, x.contiguous())
