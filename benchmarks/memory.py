"""How much a process grows by a whole transformer with random weights, as it is held in the denoising loop.

python benchmarks/memory.py MM_TYPE [--model wan-14b] [--layers N]
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import replace
from pathlib import Path

import torch

from lightx2v.attention.base import select_attention
from lightx2v.bench import work
from lightx2v.features.once import OnceParts
from lightx2v.platform import select_device

CPU = torch.device("cpu")


def resident(key: str) -> int:
    """Bytes of this process by `key` of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mm_type")
    parser.add_argument("--model", default="wan-14b")
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    device, arch = select_device("cpu"), work.arch_of(args.model)
    arch = arch if args.layers is None else replace(arch, num_layers=args.layers)
    shapes, linears = work.dit_shapes(arch)
    plain = 2 * sum(shape.numel() for shape in shapes.values())
    torch.randn(8, 8) @ torch.randn(8, 8)  # threads and kernels of the library are there before
    before = resident("VmRSS")
    attention, _, _ = select_attention("auto", device)
    plans = work.plan_layers(linears, args.mm_type, device)
    model = work.random_dit(arch, plans, device, 0, attention, False)
    with OnceParts(model, work.RandomSource(shapes, CPU), CPU, "random weights").present():
        pass
    gc.collect()
    grown, peak = resident("VmRSS") - before, resident("VmHWM")
    held = work.held_bytes(model)
    print(f"{args.model} {args.mm_type}: bfloat16 {plain / 1e9:.2f} GB, held {held / 1e9:.2f} GB = {held / plain:.4f}")
    print(f"the process grew by {grown / 1e9:.2f} GB = {grown / plain:.4f}; peak {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
