"""Sections of h200.py: whether the kernels are right, and how fast each is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.gpu.checks

from h200_common import Bench, Row

from lightx2v.attention.base import ATTENTION
from lightx2v.bench.linear import activations
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.scheme import parse
from tests.gpu.checks import Case, check_library


def check(bench: Bench) -> Iterator[Row]:
    """Codes bit-equal, products within their bound, attention near its reference, the block's kernels right."""
    from lightx2v.kernels import trial
    from lightx2v.kernels.interpreter import mend

    mend()
    device, sizes = bench.device, bench.sizes
    place = torch.device(device.torch_name)
    for name in ("int8-triton", "fp8-triton", "fp8-b128-triton"):
        for m in (1, 33) if sizes.dry else (1, 33, 4096, sizes.rows):
            n, k = sizes.weights[-1]
            check_library(LIBRARIES["triton"], parse(name), Case(m, n, k, torch.bfloat16, True), place)
            yield Row("correct", f"{name}, {m} rows of {n}x{k}", 1.0, "passed")
    for name, reference in (("triton_8bit", "sage_ref_int8_fp8"), ("triton_8bit_fp16", "sage_ref_int8_fp16")):
        q, k, v = (torch.randn(1, n, 2, sizes.head_dim, device=place).bfloat16() for n in (70, 133, 133))
        got, wanted = (ATTENTION[each].fn(q, k, v).float() for each in (name, reference))
        off = float((got - wanted).norm() / wanted.norm())
        assert off <= 0.03, f"{name} is off by {off:.3g} of its reference"
        yield Row("correct", name, off, "of the result's length")
    yield from fused(sizes.rows, sizes.weights[-1][0], place)
    problem = trial.trial(place)
    assert problem is None, problem
    yield Row("correct", "norms, rotary embedding, gates, GELU", 1.0, "passed")


def fused(rows: int, width: int, place: torch.device) -> Iterator[Row]:
    """How much the passes that do several things differ from those that do one each: not at all in the interpreter."""
    from lightx2v.kernels import ops

    x, y, gate = (torch.randn(shape, device=place) for shape in ((1, rows, width), (1, rows, width), (1, 1, width)))
    y, norm = y.bfloat16(), (gate + 1, gate, 1e-6, torch.bfloat16)
    for kind in ("int8", "fp8"):
        apart = ops.quantize_tokens(ops.layer_norm(ops.add_gated(x, y, gate), *norm)[0], kind)[0]
        together = ops.sum_norm_codes(x, y, gate, *norm[:2], None, *norm[2:], kind)[1]
        share = float((together.float() != apart.float()).float().mean())
        assert share <= 1e-3, f"{share:.3g} of the codes of a norm differ"
        yield Row(
            "correct", f"residual, norm and {kind} in one pass: codes that differ from passes apart", share, "of all"
        )
    qkv = torch.randn(1, rows, 3 * 128, device=place).bfloat16()
    q, k, v = qkv.chunk(3, dim=-1)
    turn, weight = torch.rand(rows, 32, device=place), torch.rand(128, device=place)
    turned = [ops.rms_rope(each, weight, turn, turn, 2, 1e-6).unflatten(2, (2, 64)) for each in (q, k)]
    v = v.unflatten(2, (2, 64))
    apart = ops.attention(*turned, v, 0.125, True).float()
    together = ops.attention_turned(q, k, v, weight, weight, turn, turn, 1e-6, 0.125, True).float()
    off = float((together - apart).norm() / apart.norm())
    assert off <= 0.01, f"attention with norm and rotation in its passes is off by {off:.3g}"
    yield Row(
        "correct", "norm and rotation in the passes of attention's codes, from passes apart", off, "of its length"
    )


def linears(bench: Bench) -> Iterator[Row]:
    """Quantize and multiply, beside torch's bfloat16 product and torch's own fp8."""
    device, sizes = bench.device, bench.sizes
    for n, k in sizes.weights:
        flops = 2 * sizes.rows * n * k
        x = activations(sizes.rows, k, device, 0)
        weight = torch.randn(n, k, device=x.device) * k**-0.5
        plain = weight.bfloat16()
        row = f"{n}x{k}, {sizes.rows} rows"
        taken = bench.seconds(lambda x=x, w=plain: x @ w.t())
        yield Row("linear", f"{row}: torch bf16", flops / taken / 1e12, "TFLOP/s", bench.share(flops / taken, "bf16"))
        for name in ("fp8-triton", "int8-triton", "fp8-b128-triton", "fp8-torch"):
            scheme = parse(name)
            layer = QuantLinear(k, n, True, scheme, scheme.library, torch.bfloat16, weight_auto_quant=True)
            layer.load_tensor("weight", weight)
            layer.load_tensor("bias", weight[:, 0].clone())
            layer.finish()
            taken = bench.seconds(lambda x=x, layer=layer: layer(x))
            target = "1000 TFLOP/s" if name == "fp8-triton" else ""
            of = "int8" if name.startswith("int8") else "fp8"
            yield Row(
                "linear", f"{row}: {name}", flops / taken / 1e12, "TFLOP/s", bench.share(flops / taken, of), target
            )


def quantizers(bench: Bench) -> Iterator[Row]:
    """Bytes read and written a second, as a share of a copy's."""
    device, sizes = bench.device, bench.sizes
    from lightx2v.kernels import ops

    width = max(k for _, k in sizes.weights)
    x = activations(sizes.rows, width, device, 0)
    wide = x[:, : min(k for _, k in sizes.weights)].float().contiguous()[None]
    y = wide.bfloat16()
    table = torch.ones(wide.shape[-1], device=x.device)
    works = {
        "tokens to fp8": (lambda: ops.quantize_tokens(x, "fp8"), 3 * x.numel()),
        "tokens to int8": (lambda: ops.quantize_tokens(x, "int8"), 3 * x.numel()),
        "groups of 128 to fp8": (lambda: ops.quantize_groups(x, "fp8"), 3 * x.numel()),
        "GELU and tokens to fp8": (lambda: ops.gelu_codes(x, None, "fp8"), 3 * x.numel()),
        "layer norm and tokens to fp8": (
            lambda: ops.layer_norm_codes(wide, table, table, None, 1e-6, torch.bfloat16, "fp8"),
            5 * wide.numel(),
        ),
        "residual, gate, layer norm and tokens to fp8": (
            lambda: ops.sum_norm_codes(wide, y, table, table, table, None, 1e-6, torch.bfloat16, "fp8")[1:],
            11 * wide.numel(),
        ),
    }
    for name, (call, moved) in works.items():
        taken = bench.seconds(lambda call=call: call()[1])
        yield Row(
            "quantize", name, moved / taken / 1e9, "GB/s", moved / taken / bench.top.bytes_per_s, "85 % of a copy"
        )
    heads = max(1, sizes.weights[0][1] // sizes.head_dim)
    q = torch.randn(1, sizes.rows, heads, sizes.head_dim, device=x.device).bfloat16()
    for name, turn in turned(q).items():
        yield Row("quantize", name, 1e3 * bench.seconds(lambda turn=turn: turn()[1]), "ms")


def turned(q: Tensor) -> dict[str, Callable[[], Any]]:
    """Norm, rotation and codes of queries and of keys [B, L, H, Dh]: in as few passes as there are, and apart."""
    from lightx2v.kernels import block, ops
    from lightx2v.kernels.attention_codes import KEYS, QUERIES, Turn, scores_codes

    flat, width = q.flatten(2), q.shape[2] * q.shape[3]
    turn, weight = torch.ones(q.shape[1], q.shape[3] // 2, device=q.device), torch.ones(width, device=q.device)

    def together(size: int, smooth: bool) -> Any:
        turn_ = Turn(block.rms_spread(flat, width, 1e-6), weight, turn, turn)
        return scores_codes(q, size, smooth, turn_)

    def apart(size: int, smooth: bool) -> Any:
        made = ops.rms_rope(flat, weight, turn, turn, q.shape[2], 1e-6)
        return scores_codes(made.view(q.shape), size, smooth)

    return {
        "Q: norm and rotation in the pass of the codes": partial(together, QUERIES, False),
        "Q: norm and rotation apart": partial(apart, QUERIES, False),
        "K: norm and rotation in the passes of the codes": partial(together, KEYS, True),
        "K: norm and rotation apart": partial(apart, KEYS, True),
    }


def attentions(bench: Bench) -> Iterator[Row]:
    """8-bit attention, its quantization included, beside torch's."""
    device, sizes = bench.device, bench.sizes
    for tokens in sizes.tokens:
        shape = (1, tokens, sizes.heads, sizes.head_dim)
        q, k, v = (torch.randn(shape, device=device.torch_name).bfloat16() for _ in range(3))
        flops = 4 * tokens**2 * sizes.heads * sizes.head_dim
        best = 0.0
        for name in ("torch_sdpa_flash", "torch_sdpa_cudnn", "torch_sdpa", "triton_8bit", "triton_8bit_fp16"):
            try:
                taken = bench.seconds(lambda fn=ATTENTION[name].fn, q=q, k=k, v=v: fn(q, k, v))
            except Exception as error:
                print(f"  {name}, {tokens} tokens: {type(error).__name__}: {str(error)[:160]}", flush=True)
                continue
            rate = flops / taken
            best = max(best, rate) if name.startswith("torch") else best
            target = f"1.3x of torch's best, {1.3 * best / 1e12:.4g}" if name == "triton_8bit" else ""
            yield Row(
                "attention", f"{tokens} tokens: {name}", rate / 1e12, "TFLOP/s", bench.share(rate, "bf16"), target
            )
