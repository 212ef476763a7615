"""Checks and figures of the kernels in Triton: see h200.sh. A section that fails is reported; the others still run."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.gpu.checks

from lightx2v.attention.base import ATTENTION
from lightx2v.bench import work
from lightx2v.bench.host import describe, hardware, versions
from lightx2v.bench.inputs import Size, make_inputs
from lightx2v.bench.linear import activations
from lightx2v.bench.measure import Candidate, Timing, measure
from lightx2v.bench.peers.base import choose
from lightx2v.bench.roofline import Peaks, peaks
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.scheme import parse
from lightx2v.platform import DeviceInfo, select_device
from tests.gpu.checks import Case, check_library

SECONDS = 520.0
"""After so long no further section is begun."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: of Wan2.1 14B at 832x480 and 1280x720, 81 frames; small ones for a dry run."""

    rows: int = 32760
    weights: tuple[tuple[int, int], ...] = ((5120, 5120), (13824, 5120), (5120, 13824))
    tokens: tuple[int, ...] = (32760, 75600)
    heads: int = 8
    head_dim: int = 128
    models: tuple[tuple[str, Size], ...] = (
        ("wan-1.3b", Size(832, 480, 81)),
        ("wan-14b-i2v", Size(832, 480, 81)),
        ("wan-14b-i2v", Size(1280, 720, 81)),
    )
    timing: Timing = field(default_factory=lambda: Timing(repeats=5, warmup=2))


DRY = Sizes(33, ((32, 48),), (70,), 1, 64, (("tiny", Size(64, 64, 5)),), Timing(repeats=1))


@dataclass(frozen=True)
class Row:
    """One figure. `share` is of the measured ceiling that holds for it, `target` what it should reach."""

    section: str
    name: str
    value: float
    unit: str
    share: float | None = None
    target: str = ""


Section = Callable[[DeviceInfo, Sizes, Peaks], Iterator[Row]]


def seconds(work_: Callable[[], Any], device: DeviceInfo, sizes: Sizes) -> float:
    """Median seconds of a call."""
    candidate = Candidate("it", "lightx2v", lambda: (work_, {}))
    return measure([candidate], device, sizes.timing).entries[0].median


def check(device: DeviceInfo, sizes: Sizes, top: Peaks) -> Iterator[Row]:
    """Codes bit-equal, products within their bound, attention near its reference, the block's kernels right."""
    from lightx2v.kernels import trial
    from lightx2v.kernels.interpreter import mend

    mend()
    place = torch.device(device.torch_name)
    for name in ("int8-triton", "fp8-triton", "fp8-b128-triton"):
        for m in (1, 33) if sizes is DRY else (1, 33, 4096, sizes.rows):
            n, k = sizes.weights[-1]
            check_library(LIBRARIES["triton"], parse(name), Case(m, n, k, torch.bfloat16, True), place)
            yield Row("correct", f"{name}, {m} rows of {n}x{k}", 1.0, "passed")
    for name, reference in (("triton_8bit", "sage_ref_int8_fp8"), ("triton_8bit_fp16", "sage_ref_int8_fp16")):
        q, k, v = (torch.randn(1, n, 2, sizes.head_dim, device=place).bfloat16() for n in (70, 133, 133))
        got, wanted = (ATTENTION[each].fn(q, k, v).float() for each in (name, reference))
        off = float((got - wanted).norm() / wanted.norm())
        assert off <= 0.03, f"{name} is off by {off:.3g} of its reference"
        yield Row("correct", name, off, "of the result's length")
    problem = trial.trial(place)
    assert problem is None, problem
    yield Row("correct", "norms, rotary embedding, gates, GELU", 1.0, "passed")


def linears(device: DeviceInfo, sizes: Sizes, top: Peaks) -> Iterator[Row]:
    """Quantize and multiply, beside torch's bfloat16 product and torch's own fp8."""
    for n, k in sizes.weights:
        flops = 2 * sizes.rows * n * k
        x = activations(sizes.rows, k, device, 0)
        weight = torch.randn(n, k, device=x.device) * k**-0.5
        plain = weight.bfloat16()
        row = f"{n}x{k}, {sizes.rows} rows"
        taken = seconds(lambda x=x, w=plain: x @ w.t(), device, sizes)
        yield Row("linear", f"{row}: torch bf16", flops / taken / 1e12, "TFLOP/s", share(flops / taken, top, "bf16"))
        for name in ("fp8-triton", "int8-triton", "fp8-b128-triton", "fp8-torch"):
            scheme = parse(name)
            layer = QuantLinear(k, n, False, scheme, scheme.library, torch.bfloat16, weight_auto_quant=True)
            layer.load_tensor("weight", weight)
            layer.finish()
            taken = seconds(lambda x=x, layer=layer: layer(x), device, sizes)
            target = "1000 TFLOP/s" if name == "fp8-triton" else ""
            of = "int8" if name.startswith("int8") else "fp8"
            yield Row(
                "linear", f"{row}: {name}", flops / taken / 1e12, "TFLOP/s", share(flops / taken, top, of), target
            )


def quantizers(device: DeviceInfo, sizes: Sizes, top: Peaks) -> Iterator[Row]:
    """Bytes read and written a second, as a share of a copy's."""
    from lightx2v.kernels import ops

    width = max(k for _, k in sizes.weights)
    x = activations(sizes.rows, width, device, 0)
    wide = x[:, : min(k for _, k in sizes.weights)].float().contiguous()[None]
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
    }
    for name, (call, moved) in works.items():
        taken = seconds(lambda call=call: call()[1], device, sizes)
        yield Row("quantize", name, moved / taken / 1e9, "GB/s", moved / taken / top.bytes_per_s, "85 % of a copy")


def attentions(device: DeviceInfo, sizes: Sizes, top: Peaks) -> Iterator[Row]:
    """8-bit attention, its quantization included, beside torch's."""
    for tokens in sizes.tokens:
        shape = (1, tokens, sizes.heads, sizes.head_dim)
        q, k, v = (torch.randn(shape, device=device.torch_name).bfloat16() for _ in range(3))
        flops = 4 * tokens**2 * sizes.heads * sizes.head_dim
        best = 0.0
        for name in ("torch_sdpa_flash", "torch_sdpa_cudnn", "torch_sdpa", "triton_8bit", "triton_8bit_fp16"):
            try:
                taken = seconds(lambda fn=ATTENTION[name].fn, q=q, k=k, v=v: fn(q, k, v), device, sizes)
            except Exception as error:
                print(f"  {name}, {tokens} tokens: {type(error).__name__}: {str(error)[:160]}", flush=True)
                continue
            rate = flops / taken
            best = max(best, rate) if name.startswith("torch") else best
            target = f"1.3x of torch's best, {1.3 * best / 1e12:.4g}" if name == "triton_8bit" else ""
            yield Row("attention", f"{tokens} tokens: {name}", rate / 1e12, "TFLOP/s", share(rate, top, "bf16"), target)


TARGETS = {("wan-1.3b", 480): "0.36 s", ("wan-14b-i2v", 480): "2.0 s", ("wan-14b-i2v", 720): "7.6 s"}


@torch.inference_mode()
def forwards(device: DeviceInfo, sizes: Sizes, top: Peaks) -> Iterator[Row]:
    """One forward pass with random weights: plain, with our fast path, and peers."""
    for model, size in sizes.models:
        arch = work.arch_of(model)
        _, linear_shapes = work.dit_shapes(arch)
        inputs = make_inputs(arch, size, torch.device(device.torch_name), 0)
        given = (inputs.latents, inputs.timestep, inputs.conditions)
        row = f"{model}, {size.width}x{size.height}, {size.frames} frames"
        ways = {"Default": "torch_sdpa", "fp8-torch": "torch_sdpa"}
        if device.capability is not None:
            ways["fp8-triton"] = "triton_8bit"
        for mm_type, attention in ways.items():
            plans = work.plan_layers(linear_shapes, mm_type, device)
            dit = work.random_dit(arch, plans, device, 0, ATTENTION[attention].fn, compiled=False)
            taken = seconds(lambda dit=dit, given=given: dit(*given), device, sizes)
            target = TARGETS.get((model, size.height), "") if mm_type == "fp8-triton" else ""
            yield Row("forward", f"{row}: {mm_type}, {attention}", taken, "s", target=target)
            del dit
        for choice in choose("diffusers,diffusers-compile,torchao-fp8-compile", "dit"):
            if (obstacle := choice.obstacle("dit")) is not None or sizes is DRY:
                print(f"  {choice.name}: {obstacle or 'left out of a dry run'}", flush=True)
                continue
            from lightx2v.bench.peers import diffusers

            peer = diffusers.random_transformer(arch, choice, torch.device(device.torch_name), 0)
            tensors = (inputs.latents, inputs.timestep, inputs.text, inputs.image)
            taken = seconds(lambda p=peer, t=tensors: diffusers.predict(p, *t), device, sizes)
            yield Row("forward", f"{row}: {choice.name}", taken, "s")
            del peer


def share(rate: float, top: Peaks, name: str) -> float | None:
    """Of the measured peak; None where that product could not be measured."""
    return rate / top.flops_per_s[name] if name in top.flops_per_s else None


SECTIONS: dict[str, Section] = {
    "correct": check,
    "quantize": quantizers,
    "linear": linears,
    "attention": attentions,
    "forward": forwards,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with small sizes, in Triton's interpreter")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device, sizes = select_device("cpu" if args.dry_run else "auto"), DRY if args.dry_run else Sizes()
    began = time.perf_counter()
    found = hardware(device)
    top = peaks(device, sizes.timing)
    rows = [Row("roofline", "copy", top.bytes_per_s / 1e9, "GB/s")]
    rows += [Row("roofline", name, rate / 1e12, "TFLOP/s") for name, rate in top.flops_per_s.items()]
    failed: dict[str, str] = {}
    for name, section in SECTIONS.items():
        if time.perf_counter() - began > SECONDS:
            failed[name] = "no time was left"
            continue
        try:
            for row in section(device, sizes, top):
                rows.append(row)
                print(line(row), flush=True)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            traceback.print_exc()
            if name == "correct" and not args.dry_run:
                print("the figures below are of kernels that are not right", flush=True)
    about = [describe(found), ", ".join(f"{k} {v}" for k, v in versions(("triton", "torchao")).items())]
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "dry_run": args.dry_run, "rows": [asdict(row) for row in rows], "failed": failed}
    (args.out / "h200.json").write_text(json.dumps(content, indent=1), "utf-8")
    (args.out / "h200.md").write_text(markdown(about, rows, failed), "utf-8")
    print(
        f"{len(rows)} figures, {len(failed)} sections failed: {failed or 'none'}; {time.perf_counter() - began:.0f} s"
    )
    return 1 if failed else 0


def line(row: Row) -> str:
    """A row as text."""
    of = "" if row.share is None else f", {row.share:.0%} of the ceiling"
    target = f" (target: {row.target})" if row.target else ""
    return f"{row.section}: {row.name}: {row.value:.4g} {row.unit}{of}{target}"


def markdown(about: list[str], rows: list[Row], failed: dict[str, str]) -> str:
    """The table."""
    lines = [*(f"- {text}" for text in about), *(f"- {name} failed: {why}" for name, why in failed.items()), ""]
    lines += ["| | | figure | of the ceiling | target |", "|---|---|---:|---:|---|"]
    for row in rows:
        of = "" if row.share is None else f"{row.share:.0%}"
        lines.append(f"| {row.section} | {row.name} | {row.value:.4g} {row.unit} | {of} | {row.target} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
