"""Stand-ins for the vendors' packages: they insist on what the real functions insist on, note each call, and compute
with the reference. `install` puts them into sys.modules.

What they insist on is read from the sources named in signatures/: csrc/**/scaled_mm_entry.cu and scaled_mm_helper.hpp
(vLLM), csrc/gemm/*_gemm_kernel.cu and per_token_*quant*.cu (sgl-kernel), csrc/gemm/q8_gemm_api.cpp (q8_kernels),
csrc/utils/layout.hpp and csrc/apis (DeepGEMM), kernel/intmm.py and torch._scaled_mm (torchao).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightx2v import vendor
from lightx2v.mm import adapter
from lightx2v.mm.reference import dequantize_groups, int_product
from lightx2v.quant.numerics import Quantized, dequantize_weight, quantize_activation, rounding_of
from lightx2v.quant.spec import FP8_BLOCK128, FP8_GROUP128, FP8_TOKEN, INT8_TOKEN

FP8 = torch.float8_e4m3fn
HALVES = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """One call of a vendor's function: its last name, and what it was given, by parameter."""

    name: str
    given: dict[str, Any]


CALLS: list[Call] = []


def note(name: str, given: dict[str, Any]) -> None:
    CALLS.append(Call(name, {key: value for key, value in given.items() if value is not None}))


def is_scale(scale: Tensor, count: int) -> bool:
    return scale.dtype == torch.float32 and scale.is_contiguous() and scale.numel() == count


def scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: torch.dtype) -> Tensor:
    """a [M, K] times b [N, K], scaled by channel, then by token, in float32."""
    product = int_product(a, b) if a.dtype == torch.int8 else a.float() @ b.float().t()
    result = product.float() * scale_b.view(1, -1) * scale_a.view(-1, 1)
    return (result if bias is None else result + bias.float()).to(out)


def check_columns(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: torch.dtype
) -> None:
    """What vLLM's and sgl-kernel's CUTLASS products insist on."""
    assert a.dtype == b.dtype and a.dtype in (torch.int8, FP8)
    assert a.stride(1) == 1 and b.stride(0) == 1 and a.shape[1] == b.shape[0]
    assert b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0 and b.stride(1) % 16 == 0
    assert is_scale(scale_a, a.shape[0]) and is_scale(scale_b, b.shape[1]) and out in HALVES
    assert bias is None or (bias.dtype == out and bias.is_contiguous() and bias.shape == (b.shape[1],))


def cutlass_scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    note("cutlass_scaled_mm", locals())
    check_columns(a, b, scale_a, scale_b, bias, out_dtype)
    return scaled(a, b.t(), scale_a, scale_b, bias, out_dtype)


def scaled_fp8_quant(
    input: Tensor,
    scale: Any = None,
    num_token_padding: Any = None,
    scale_ub: Any = None,
    use_per_token_if_dynamic: bool = False,
    output: Any = None,
    group_shape: Any = None,
) -> tuple[Tensor, Tensor]:
    note("scaled_fp8_quant", locals())
    assert input.ndim == 2 and input.stride(1) == 1 and use_per_token_if_dynamic and scale is None
    return quantize_activation(input, FP8_TOKEN, rounding_of("vllm", FP8_TOKEN))


def scaled_int8_quant(
    input: Tensor, scale: Any = None, azp: Any = None, symmetric: bool = True
) -> tuple[Tensor, Tensor, None]:
    note("scaled_int8_quant", locals())
    assert input.is_contiguous() and scale is None and symmetric
    return (*quantize_activation(input, INT8_TOKEN, rounding_of("vllm", INT8_TOKEN)), None)


def old_scaled_int8_quant(input: Tensor, scale: Any = None) -> tuple[Tensor, Tensor]:
    """As in vLLM 0.6.0, without a zero point."""
    return scaled_int8_quant(input, scale)[:2]


def int8_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    note("int8_scaled_mm", locals())
    assert mat_a.dtype == torch.int8
    check_columns(mat_a, mat_b, scales_a, scales_b, bias, out_dtype)
    return scaled(mat_a, mat_b.t(), scales_a, scales_b, bias, out_dtype)


def fp8_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    note("fp8_scaled_mm", locals())
    assert mat_a.dtype == FP8
    check_columns(mat_a, mat_b, scales_a, scales_b, bias, out_dtype)
    return scaled(mat_a, mat_b.t(), scales_a, scales_b, bias, out_dtype)


def sgl_per_token_quant_fp8(input: Tensor, output_q: Tensor, output_s: Tensor) -> None:
    note("sgl_per_token_quant_fp8", locals())
    assert all(tensor.is_contiguous() for tensor in (input, output_q, output_s)) and input.shape[1] % 4 == 0
    assert output_q.dtype == FP8 and output_s.dtype == torch.float32 and output_s.shape == (input.shape[0], 1)
    codes, scale = quantize_activation(input, FP8_TOKEN, rounding_of("sgl", FP8_TOKEN))
    # A zero row divides by zero in the real kernel: its codes are 448, which a scale of zero makes up for.
    output_q.copy_(torch.where(scale == 0, 448.0, codes.float()).to(FP8))
    output_s.copy_(scale)


def sgl_per_token_group_quant_fp8(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: Any = None,
    enable_v2: Any = None,
) -> None:
    note("sgl_per_token_group_quant_fp8", locals())
    assert enable_v2 is False, "leaving it to the package imports the engine"
    old_group_quant(input, output_q, output_s, group_size, eps, fp8_min, fp8_max)


def old_group_quant(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, fp8_min: float, fp8_max: float
) -> None:
    """As in sgl-kernel 0.1.0."""
    assert input.dtype in HALVES and input.is_contiguous() and output_q.is_contiguous()
    assert (group_size, eps, fp8_min, fp8_max) == (128, 1e-10, -448.0, 448.0)
    assert output_s.dtype == torch.float32 and output_s.shape == (input.shape[0], input.shape[1] // 128)
    codes, scale = quantize_activation(input, FP8_GROUP128, rounding_of("sgl", FP8_GROUP128))
    output_q.copy_(codes)
    output_s.copy_(scale)


def per_token_quant_int8(x: Tensor, scale_dtype: Any = torch.float32, cal_sum: bool = False) -> tuple[Tensor, Tensor]:
    note("per_token_quant_int8", locals())
    assert x.is_contiguous()
    return quantize_activation(x, INT8_TOKEN, rounding_of("sgl", INT8_TOKEN))


def tiles(a: Tensor, b: Tensor, bias: Tensor | None, scale_a: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """q8_kernels' products: whole tiles, float32 bias, bfloat16 results with a batch dimension."""
    assert a.is_contiguous() and b.is_contiguous() and b.shape[0] % 128 == 0 and b.shape[1] % 64 == 0
    assert is_scale(scale_a, a.shape[0]) and is_scale(scale_b, b.shape[0]) and out == torch.bfloat16
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    return scaled(a, b, scale_a, scale_b, bias, out).unsqueeze(0)


def q8_linear(
    a: Tensor, b: Tensor, bias: Any = None, scale_a: Any = None, scale_b: Any = None,
    fuse_gelu: bool = False, out_dtype: Any = None,
) -> Tensor:  # fmt: skip
    note("q8_linear", locals())
    assert a.dtype == torch.int8 and not fuse_gelu
    return tiles(a, b, bias, scale_a, scale_b, out_dtype)


def fp8_linear(
    a: Tensor, b: Tensor, bias: Any = None, scale_a: Any = None, scale_b: Any = None,
    use_hadamard: bool = False, out_dtype: Any = None,
) -> Tensor:  # fmt: skip
    note("fp8_linear", locals())
    assert a.dtype == FP8 and not use_hadamard
    return tiles(a, b, bias, scale_a, scale_b, out_dtype)


def get_mn_major_tma_aligned_tensor(x: Tensor) -> Tensor:
    note("get_mn_major_tma_aligned_tensor", locals())
    aligned = torch.empty_strided(x.shape, (1, -(-x.shape[0] // 4) * 4), dtype=x.dtype)
    return aligned.copy_(x)


def fp8_gemm_nt(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, c: Any = None, recipe: Any = None,
    recipe_a: Any = None, recipe_b: Any = None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    note("fp8_gemm_nt", locals())
    gemm_fp8_fp8_bf16_nt(a, b, d)


def gemm_fp8_fp8_bf16_nt(lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor], out: Tensor) -> None:
    """As in DeepGEMM 1.0.0; it would copy scales of another layout, slowly."""
    note("gemm_fp8_fp8_bf16_nt", locals())
    (codes, scale), (weight, weight_scale) = lhs, rhs
    (m, k), n = codes.shape, weight.shape[0]
    assert codes.dtype == weight.dtype == FP8 and codes.stride(1) == weight.stride(1) == 1 and k % 128 == 0
    assert out.dtype == torch.bfloat16 and out.shape == (m, n) and out.stride(0) % 8 == 0
    assert scale.shape == (m, k // 128) and scale.dtype == torch.float32
    assert (scale.stride(0) == 1 or m == 1) and scale.stride(1) == -(-m // 4) * 4
    assert weight_scale.shape == (-(-n // 128), k // 128) and weight_scale.is_contiguous()
    values = dequantize_groups(Quantized(codes, scale), 128, torch.float32)
    out.copy_(values @ dequantize_weight(weight, weight_scale, FP8_BLOCK128).t())


def int_scaled_matmul(a: Tensor, b: Tensor, scales1: Tensor) -> Tensor:
    note("int_scaled_matmul", locals())
    assert a.dtype == b.dtype == torch.int8 and b.is_contiguous() and scales1.is_contiguous()
    assert scales1.shape == (a.shape[0], 1)
    return int_product(a, b.t().contiguous()) * scales1


def quantize_activation_per_token_absmax(t: Tensor) -> tuple[Tensor, Tensor]:
    note("quantize_activation_per_token_absmax", locals())
    codes, scale = quantize_activation(t, INT8_TOKEN, rounding_of("torchao", INT8_TOKEN))
    return codes, scale.view(-1).to(torch.bfloat16 if t.dtype == torch.bfloat16 else torch.float32)


def addmm_float8_unwrapped_inference(
    a_data: Tensor, a_scale: Tensor, b_data: Tensor, b_scale: Tensor, output_dtype: Any,
    output_scale: Any = None, bias: Any = None, use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    note("addmm_float8_unwrapped_inference", locals())
    # torch._scaled_mm with a scale per row and column gives bfloat16 alone.
    assert output_dtype == torch.bfloat16 and use_fast_accum and bias is None
    assert a_scale.shape == (a_data.shape[0], 1) and b_scale.shape == (1, b_data.shape[1])
    check_columns(a_data, b_data, a_scale, b_scale, None, output_dtype)
    return scaled(a_data, b_data.t(), a_scale, b_scale, None, output_dtype)


_SGL = (int8_scaled_mm, fp8_scaled_mm, sgl_per_token_quant_fp8, sgl_per_token_group_quant_fp8)
SGLANG = "sglang.srt.layers.quantization.int8_kernel:per_token_quant_int8"
FAKES: dict[str, Callable[..., Any]] = {
    **{f"vllm._custom_ops:{f.__name__}": f for f in (cutlass_scaled_mm, scaled_fp8_quant, scaled_int8_quant)},
    **{f"sgl_kernel:{f.__name__}": f for f in _SGL},
    **{f"q8_kernels.functional.linear:{f.__name__}": f for f in (q8_linear, fp8_linear)},
    **{f"deep_gemm:{f.__name__}": f for f in (fp8_gemm_nt, get_mn_major_tma_aligned_tensor)},
    SGLANG: per_token_quant_int8,
    "torchao.kernel.intmm:int_scaled_matmul": int_scaled_matmul,
    "torchao.float8.inference:addmm_float8_unwrapped_inference": addmm_float8_unwrapped_inference,
    "torchao.quantization.utils:quantize_activation_per_token_absmax": quantize_activation_per_token_absmax,
}


def forget() -> None:
    """Drop what the engine has found out about the installed packages, and the calls noted so far."""
    vendor.load.cache_clear()
    vendor._find.cache_clear()
    adapter.trial.cache_clear()
    CALLS.clear()


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none of the packages were installed, also where one is."""
    packages = {place.partition(":")[0].partition(".")[0] for place in FAKES}
    for imported in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, imported)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    forget()


def install(
    monkeypatch: pytest.MonkeyPatch, functions: dict[str, Callable[..., Any] | None], version: str = "9.9.9"
) -> None:
    """Make packages of `functions` ("package.module:name" to function; None leaves the module without it).

    The other packages of FAKES are hidden.
    """
    hide(monkeypatch)
    modules: dict[str, Any] = {}
    for place, function in functions.items():
        path, _, name = place.partition(":")
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            dotted = ".".join(parts[:depth])
            if dotted not in modules:
                module: Any = types.ModuleType(dotted)
                module.__path__, module.__version__ = [], version
                modules[dotted] = module
        if function is not None:
            setattr(modules[path], name, function)
    for dotted, module in modules.items():
        monkeypatch.setitem(sys.modules, dotted, module)
