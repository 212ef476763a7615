"""Stand-ins for the packages of attention kernels: they insist on what the real functions insist on, note each call,
and compute in torch. `install` puts them into sys.modules.

What they insist on is read from the sources named in signatures/: csrc/flash_attn/flash_api.cpp, hopper/flash_api.cpp
and flash_attn/cute/interface.py (FlashAttention), sageattention/core.py and sageattn3/api.py with blackwell/api.cu
(SageAttention), spas_sage_attn/core.py (SpargeAttn).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightx2v.attention import flash2, flash3, flash4, hub, sage, sparge, xformers
from lightx2v.vendor import Function
from tests.contracts import vendors
from tests.contracts.vendors import FP8, HALVES, note

FUNCTIONS: list[Function] = [
    flash2.FUNCTION, flash3.FUNCTION, flash3.FUNCTION_FP8, flash4.FUNCTION, sage.AUTO, sage.ADA, sage.HOPPER, sage.FP4,
    xformers.FUNCTION, sparge.TOP, sparge.MASKED, hub.GET,
]  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Tokens before heads, as the packages that call it NHD or BMHK."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, dtypes: tuple[torch.dtype, ...], dims: range) -> None:
    assert q.dtype == k.dtype == v.dtype and q.dtype in dtypes
    assert all(x.stride(-1) == 1 and x.dim() == 4 for x in (q, k, v))
    assert k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and q.shape[-1] in dims


def flash_attn2_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: Any = 0.0, softmax_scale: Any = None, causal: Any = False,
    window_size: Any = (-1, -1), softcap: Any = 0.0, alibi_slopes: Any = None, deterministic: Any = False,
    return_attn_probs: Any = False,
) -> Tensor:  # fmt: skip
    note("flash_attn2", locals())
    check(q, k, v, HALVES, range(8, 257, 8))
    assert dropout_p == 0.0 and causal is False
    return attend(q, k, v, softmax_scale)


def flash_attn3_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: Any = False, qv: Any = None,
    q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
    attention_chunk: Any = 0, softcap: Any = 0.0, num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False,
    sm_margin: Any = 0, return_attn_probs: Any = False,
) -> Tensor:  # fmt: skip
    note("flash_attn3", locals())
    assert causal is False
    if q.dtype != FP8:
        check(q, k, v, HALVES, range(8, 257, 8))
        return attend(q, k, v, softmax_scale)
    check(q, k, v, (FP8,), range(16, 257, 16))
    scales = (q_descale, k_descale, v_descale)
    assert all(scale.shape == (q.shape[0], q.shape[2]) and scale.dtype == torch.float32 for scale in scales)
    values = [x.float() * scale[:, None, :, None] for x, scale in zip((q, k, v), scales, strict=True)]
    return attend(*values, softmax_scale).bfloat16()


def flash_attn4_func(
    q: Tensor, k: Tensor, v: Tensor, qv: Any = None, gather_kv_indices: Any = None, softmax_scale: Any = None,
    causal: Any = False, window_size: Any = (None, None), learnable_sink: Any = None, softcap: Any = 0.0,
    num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, score_mod: Any = None,
    score_mod_bwd: Any = None, mask_mod: Any = None, aux_tensors: Any = None, aux_scalars: Any = None,
    block_sparse_tensors: Any = None, block_sparse_tensors_bwd: Any = None, return_lse: Any = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    note("flash_attn4", locals())
    check(q, k, v, HALVES, range(8, 129, 8))
    assert causal is False
    return attend(q, k, v, softmax_scale), None


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: Any = "HND", is_causal: Any = False, sm_scale: Any = None,
    return_lse: Any = False,
) -> Tensor:  # fmt: skip
    note("sageattn", locals())
    check(q, k, v, HALVES, range(1, 129))
    assert tensor_layout == "NHD" and is_causal is False
    return attend(q, k, v, sm_scale)


def sage_fp8(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: Any = "HND", is_causal: Any = False,
    qk_quant_gran: Any = "per_thread", sm_scale: Any = None, pv_accum_dtype: Any = "fp32+fp16", smooth_k: Any = True,
    smooth_v: Any = False, return_lse: Any = False,
) -> Tensor:  # fmt: skip
    note("sage_fp8", locals())
    assert qk_quant_gran in ("per_warp", "per_thread") and pv_accum_dtype == "fp32+fp32" and smooth_k is True
    check(q, k, v, HALVES, range(1, 129))
    assert tensor_layout == "NHD" and is_causal is False
    return attend(q, k, v, sm_scale)


def sage_fp8_sm90(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: Any = "HND", is_causal: Any = False,
    qk_quant_gran: Any = "per_thread", sm_scale: Any = None, pv_accum_dtype: Any = "fp32+fp32", smooth_k: Any = True,
    return_lse: Any = False,
) -> Tensor:  # fmt: skip
    note("sage_fp8_sm90", locals())
    assert qk_quant_gran == "per_thread" and pv_accum_dtype == "fp32+fp32" and smooth_k is True
    check(q, k, v, HALVES, range(1, 129))
    assert tensor_layout == "NHD" and is_causal is False
    return attend(q, k, v, sm_scale)


def sageattn3_blackwell(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: Any = False, per_block_mean: Any = True
) -> Tensor:
    """Heads before tokens; it has no scale, and takes the mean out of the keys where they lie."""
    note("sageattn3", locals())
    q, v = q.transpose(1, 2), v.transpose(1, 2)
    check(q, k.transpose(1, 2), v, HALVES, range(64, 129, 64))
    assert attn_mask is None and is_causal is False
    k -= k.mean(dim=-2, keepdim=True)
    return attend(q, k.transpose(1, 2), v, None).transpose(1, 2)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: Any = 0.0, scale: Any = None, op: Any = None,
    output_dtype: Any = None,
) -> Tensor:  # fmt: skip
    note("xformers", locals())
    check(query, key, value, (*HALVES, torch.float32), range(8, 257, 8))
    assert attn_bias is None and p == 0.0
    return attend(query, key, value, scale)


def sparge_topk(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False,
    scale: Any = None, smooth_k: Any = True, simthreshd1: Any = -0.1, cdfthreshd: Any = None, topk: Any = 0.5,
    pvthreshd: Any = 50, attention_sink: Any = False, tensor_layout: Any = "HND", output_dtype: Any = torch.float16,
    return_sparsity: Any = False,
) -> Tensor:  # fmt: skip
    note("sparge", locals())
    check(q, k, v, HALVES, range(64, 129, 64))
    assert tensor_layout == "NHD" and q.shape[1] >= 128 and is_causal is False and attn_mask is None
    return attend(q, k, v, scale)


def sparge_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask_id: Any = None, dropout_p: Any = 0.0, scale: Any = None, smooth_k: Any = True,
    pvthreshd: Any = 50, attention_sink: Any = False, tensor_layout: Any = "HND", output_dtype: Any = torch.float16,
    return_sparsity: Any = False,
) -> Tensor:  # fmt: skip
    note("sparge_blocks", locals())
    check(q, k, v, HALVES, range(64, 129, 64))
    assert tensor_layout == "NHD" and q.shape[1] >= 128
    batch, queries, heads, _ = q.shape
    assert mask_id.shape == (batch, heads, -(-queries // 128), -(-k.shape[1] // 64)) and mask_id.dtype == torch.int8
    mask = mask_id.bool().repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, :queries, : k.shape[1]]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


HUB = {
    "kernels-community/flash-attn2": SimpleNamespace(flash_attn_func=flash_attn2_func),
    "kernels-community/flash-attn3": SimpleNamespace(flash_attn_func=flash_attn3_func),
    "kernels-community/flash-attn4": SimpleNamespace(flash_attn_func=flash_attn4_func),
    "kernels-community/sage-attention": SimpleNamespace(sageattn=sageattn),
}


def get_kernel(repo_id: str, revision: Any = None, version: Any = None) -> SimpleNamespace:
    note("get_kernel", locals())
    assert isinstance(version, int)
    return HUB[repo_id]


_SAGE = "sageattention:sageattn_qk_int8_pv_fp8_cuda"
FAKES: dict[str, Callable[..., Any]] = {
    "flash_attn:flash_attn_func": flash_attn2_func,
    "flash_attn_interface:flash_attn_func": flash_attn3_func,
    "flash_attn.cute:flash_attn_func": flash_attn4_func,
    "sageattention:sageattn": sageattn,
    _SAGE: sage_fp8,
    f"{_SAGE}_sm90": sage_fp8_sm90,
    "sageattn3:sageattn3_blackwell": sageattn3_blackwell,
    "xformers.ops:memory_efficient_attention": memory_efficient_attention,
    "spas_sage_attn:spas_sage2_attn_meansim_topk_cuda": sparge_topk,
    "spas_sage_attn:block_sparse_sage2_attn_cuda": sparge_blocks,
    "kernels:get_kernel": get_kernel,
}


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none of the packages were installed, also where one is."""
    packages = {place.partition(":")[0].partition(".")[0] for place in FAKES}
    for imported in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, imported)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    hub.fetch.cache_clear()
    vendors.forget()


def install(monkeypatch: pytest.MonkeyPatch, *places: str, version: str = "9.9.9") -> None:
    """Make the packages of `places`, or of all of FAKES, and hide the others."""
    hide(monkeypatch)
    vendors.install(monkeypatch, {place: FAKES[place] for place in places or FAKES}, version)
