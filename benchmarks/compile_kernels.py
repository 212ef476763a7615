"""Compile every kernel in Triton for a GPU that is not here; read registers, spills and instructions off the result.

python benchmarks/compile_kernels.py --capability 9.0

Uses the compiler, ptxas and cuobjdump of the triton package. Nothing is launched.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from lightx2v.kernels import attention, gemm, launch, ops, tiles
from lightx2v.kernels.quantize import scales_of_groups

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTMALDG", "UTMASTG", "LDL", "STL")
"""Products by warp groups, by warps; tile copies in and out; spilled loads and stores."""
MULTIPROCESSORS = 132


class NoDriver:
    """What the compiler asks a driver for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def report(compiled: Any) -> str:
    """Registers, bytes of stack and of shared memory, and how many of INSTRUCTIONS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    words = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    registers, stack = found.groups() if found else ("?", "?")
    return f"{registers} registers, {stack} bytes of stack, {compiled.metadata.shared} of shared memory; {words}"


def compile_only(original: Callable[..., Any]) -> Callable[..., None]:
    """In the place of a launch."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        chosen = {name: value for name, value in options.items() if name.isupper() or name.startswith("num_")}
        try:
            words = report(original(self, *args, grid=grid, warmup=True, **options))
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        print(f"{self.__name__} {chosen}: {words}", flush=True)

    return run


def kernels(fp8: bool) -> None:
    """Call every operator on tensors of the sizes of Wan 14B, with few rows."""
    x, table = torch.empty(1, 256, 5120), torch.ones(1, 1, 5120)
    half = x.bfloat16()
    kinds = ("int8", "fp8") if fp8 else ("int8",)
    for kind in kinds:
        ops.quantize_tokens(half[0], kind)
        ops.layer_norm_codes(x, table, table, None, 1e-6, torch.bfloat16, kind)
        ops.sum_norm_codes(x, half, table, table, table, None, 1e-6, torch.bfloat16, kind)
        ops.gelu_codes(half[0], None, kind)
        ops.joined_gelu_codes(half[0, :, :1024], half[0, :, 1024:], None, kind)
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
        a, b = (torch.zeros(rows, 5120, dtype=torch.uint8).view(dtype) for rows in (256, 13824))
        bias = torch.empty(13824)
        ops.multiply_rows(a, b, torch.empty(256, 1), torch.empty(13824, 1), bias, torch.bfloat16)
        if kind == "fp8":
            ops.quantize_groups(half[0], kind)
            blocks = torch.empty(108, 40)
            ops.multiply_blocks(a, b, scales_of_groups(256, 5120, a.device), blocks, bias, torch.bfloat16)
    ops.layer_norm(x, table, table, 1e-6, torch.bfloat16)
    ops.add_gated(x, half, table)
    ops.gelu_tanh(half)
    ops.rms_rope(half, table[0, 0], torch.empty(256, 64), torch.empty(256, 64), 40, 1e-6)
    heads = torch.empty(1, 1024, 4, 128, dtype=torch.bfloat16)
    for eight in (True, False) if fp8 else (False,):
        ops.attention(heads, heads, heads, 0.1, eight)
    wide, turn = half[..., :512], torch.empty(256, 64)
    values = wide.unflatten(2, (4, 128))
    ops.attention_turned(wide, wide, values, table[0, 0, :512], table[0, 0, :512], turn, turn, 1e-6, 0.1, fp8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", default="9.0")
    major, minor = map(int, parser.parse_args().capability.split("."))
    capability = (major, minor)
    driver.set_active(NoDriver(10 * major + minor))
    jit.JITFunction.run = compile_only(jit.JITFunction.run)
    patched: Any
    for patched in (launch, tiles):
        patched.compute_capability = lambda device: capability
    for patched in (gemm, attention):
        patched.copies_tensors = lambda device: capability >= launch.HOPPER
    gemm.persistent_programs = lambda device, count: min(count, MULTIPROCESSORS)
    tiles.fastest = lambda key, candidates, run, device: [run(tile) for tile in candidates] and candidates[0]
    print(f"triton {triton.__version__}, compute capability {major}.{minor}")
    kernels(fp8=capability >= (8, 9))


if __name__ == "__main__":
    main()
