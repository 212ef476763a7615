"""Time and memory of one forward pass of a DiT with random weights, in memory and offloaded: a table in Markdown.

    python benchmarks/offload.py --model wan-1.3b --size 832x480 --frames 9 off lazy-block lazy-phase
    python benchmarks/offload.py --model wan-14b --mm_type fp8 --device auto off block phase

Each form runs in a process of its own. Memory is what it takes beyond Python and its libraries: on a CPU all that is
resident, on an accelerator what torch has allocated there. The weights are random and come from no checkpoint, so
that lazy-* keeps all of them in its temporary file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lightx2v.attention.base import select_attention
from lightx2v.bench import work
from lightx2v.bench.inputs import Size, make_inputs
from lightx2v.config.features import OffloadConfig
from lightx2v.features.offload.load import load_offloaded
from lightx2v.features.once import OnceParts
from lightx2v.io.weights import stream_into
from lightx2v.mm.fused import fuse_projections
from lightx2v.mm.linear import swap_linears
from lightx2v.models.base import run_blocks, set_attention
from lightx2v.platform import DeviceInfo, peak_memory, reset_peak_memory, select_device, synchronize

FORMS: dict[str, OffloadConfig | None] = {
    "off": None,
    "model": OffloadConfig(enabled=True, granularity="model"),
    "block": OffloadConfig(enabled=True),
    "half": OffloadConfig(enabled=True, ratio=0.5),
    "phase": OffloadConfig(enabled=True, granularity="phase"),
    "lazy-block": OffloadConfig(enabled=True, lazy_load=True),
    "lazy-phase": OffloadConfig(enabled=True, granularity="phase", lazy_load=True),
}
GIB = 2**30


def measure(args: argparse.Namespace, form: str) -> dict[str, Any]:
    """Load, then run `args.repeat` forward passes of one form."""
    device = select_device(args.device)
    torch_device = torch.device(device.torch_name)
    arch = replace(work.arch_of(args.model), **json.loads(args.arch))
    with torch.device("meta"):
        model = work.family().build_dit(arch)
    shapes, linears = work.dit_shapes(arch)
    plain_bytes = sum(shape.numel() for shape in shapes.values()) * work.DTYPE.itemsize
    swap_linears(model, work.plan_layers(linears, args.mm_type, device), work.DTYPE, auto_quant=True)
    source = work.RandomSource(shapes, torch_device)
    before = reset(device)
    began = time.perf_counter()
    offload, once = load(model, source, FORMS[form], device)
    loaded, loading = time.perf_counter() - began, peak_memory(device) - before
    width, height = map(int, args.size.split("x"))
    inputs = make_inputs(arch, Size(width, height, args.frames), torch_device, 0)
    with once.present():
        times, prepared = model.embed_time(inputs.timestep), model.prepare(inputs.conditions)
    seconds = []
    reset(device)
    with offload.running() if offload else nullcontext():
        for _ in range(args.repeat):
            began = time.perf_counter()
            stream, context = model.embed(inputs.latents, times, prepared)
            out = model.head(run_blocks(model, stream, context), context)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        looping = peak_memory(device)
    return {
        "form": form,
        "weights": plain_bytes,
        "before": before,
        "loading": loading,
        "looping": looping,
        "host": offload.host_bytes if offload else 0,
        "load_seconds": loaded,
        "seconds": min(seconds),
        "result": hashlib.sha256(out.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12],
    }


def reset(device: DeviceInfo) -> int:
    """Start the measurement of the peak anew; returns what is taken now."""
    reset_peak_memory(device)
    return peak_memory(device)


def load(
    model: Any, source: work.RandomSource, form: OffloadConfig | None, device: DeviceInfo
) -> tuple[Any, OnceParts]:
    """Fill a meta model, offloaded or not."""

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if any(fnmatchcase(name, glob) for glob in model.fp32_names) else work.DTYPE

    torch_device, offload = torch.device(device.torch_name), None
    if form is None:
        stream_into(model, source.read(), device=torch_device, dtype_of=dtype_of, where="random weights")
        fuse_projections(model)
    else:
        offload = load_offloaded(model, source, form, device=device, dtype_of=dtype_of, where="random weights")
    set_attention(model, select_attention("auto", device)[0])
    module: nn.Module = model
    return offload, OnceParts(module.eval(), source, torch_device, "random weights")


def table(rows: list[dict[str, Any]], device: DeviceInfo) -> str:
    lines = [
        "| offload | s per forward | peak memory, loading | peak memory, loop | of bf16 weights | host | same bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        taken = row["loading"], row["looping"] - row["before"]
        peaks, share = [f"{peak / GIB:.2f} GiB" for peak in taken], max(taken) / row["weights"]
        same = "yes" if row["result"] == rows[0]["result"] else "NO"
        host = f"{row['host'] / GIB:.2f} GiB" if device.kind != "cpu" else "-"
        cells = [row["form"], f"{row['seconds']:.2f}", *peaks, f"{share:.0%}", host, same]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="+", choices=FORMS)
    parser.add_argument("--model", default="wan-1.3b", choices=work.MODELS)
    parser.add_argument("--arch", default="{}", metavar="JSON", help="sizes in place of the model's")
    parser.add_argument("--mm_type", default="Default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="measure the first form here, and print its figures")
    args = parser.parse_args()
    if args.json:
        with torch.inference_mode():
            print(json.dumps(measure(args, args.forms[0])))
        return
    rows = []
    for form in args.forms:
        options = [word for word in sys.argv[1:] if word not in FORMS]
        command = [sys.executable, __file__, "--json", form, *options]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    print(table(rows, select_device(args.device)))


if __name__ == "__main__":
    main()
