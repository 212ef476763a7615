"""What a figure depends on besides the code: the hardware, the threads, the versions."""

from __future__ import annotations

import os
import platform as python_platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightx2v.platform import DeviceInfo, probe
from lightx2v.units import human_bytes

#: Flags of /proc/cpuinfo that decide which products of low precision a CPU has.
_ISA = "avx2 avx512f avx_vnni avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_int8 asimd i8mm bf16 sve".split()
PACKAGES = ("torch", "diffusers", "transformers")


def _cpuinfo() -> dict[str, str]:
    """The first entry of /proc/cpuinfo by key; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: DeviceInfo) -> dict[str, Any]:
    """The device, and the CPU beside it."""
    import torch

    cpu = _cpuinfo()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    model = cpu.get("model name") or python_platform.processor() or python_platform.machine()
    return {
        "device": device.torch_name,
        "name": model if device.kind == "cpu" else device.name,
        "capability": list(device.capability) if device.capability else None,
        "memory_bytes": device.total_memory,
        "cpu": model,
        "cpu_family": f"family {cpu['cpu family']} model {cpu['model']}" if "cpu family" in cpu else None,
        "isa": [flag for flag in _ISA if flag in flags],
        "cores": cores(),
        "threads": torch.get_num_threads(),
    }


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Versions of this package, of Python and of each of `modules` that is installed."""
    from lightx2v import __version__

    found = {name: probe(name).version for name in (*PACKAGES, *modules)}
    there = {name: version for name, version in found.items() if version is not None}
    return {"lightx2v": __version__, "python": python_platform.python_version(), **there}


def describe(found: dict[str, Any]) -> str:
    """`hardware` in one line."""
    capability = f", compute capability {'.'.join(map(str, found['capability']))}" if found["capability"] else ""
    family = f" ({found['cpu_family']})" if found["cpu_family"] else ""
    isa = f"; {' '.join(found['isa'])}" if found["isa"] else ""
    beside = "" if found["device"] == "cpu" else f"; CPU {found['cpu']}{family}"
    name = found["name"] + (family if found["device"] == "cpu" else "")
    memory = human_bytes(found["memory_bytes"])
    return f"{name}{capability}, {memory}{beside}, cores: {found['cores']}, threads: {found['threads']}{isa}"


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Give torch `count` threads, and the process as many cores: some libraries bring a thread pool of their own."""
    import torch

    if count is None:
        yield
        return
    threads = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        torch.set_num_threads(count)
        if allowed is not None:
            os.sched_setaffinity(0, sorted(allowed)[:count])
        yield
    finally:
        torch.set_num_threads(threads)
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
