"""What this machine has: devices, versions, kernel and attention libraries."""

from __future__ import annotations

import platform as python_platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from lightx2v.platform import DeviceInfo, install_hint, list_devices, probe

PACKAGES = ("torch", "transformers", "diffusers")
KERNELS = ("vllm", "sgl_kernel", "q8_kernels", "deep_gemm", "torchao", "triton")
_TITLES = {"q8_kernels": "q8_kernels (Q8F)"}
_IMPORT_SECONDS = 120
_NO_DEVICE = "no device here can run it"
_COMPILER = "install a C++ compiler for CPUs, triton for GPUs"


def examine() -> dict[str, Any]:
    """Everything as plain data.

    An entry has the `version` that works here; or the `reason` why none does, and its remedy: the command that would
    `install` it, the device that it `needs` and this machine lacks, or both.
    """
    from lightx2v import __version__

    torch, devices = _package("torch"), list_devices()
    needs = _hardware(devices) if torch["version"] else {}
    return {
        "lightx2v": __version__,
        "python": python_platform.python_version(),
        "devices": [{"torch_name": device.torch_name, **asdict(device)} for device in devices],
        "packages": {"torch": torch} | {name: _package(name) for name in PACKAGES[1:]},
        "kernels": {name: _library(name, needs.get(name)) for name in KERNELS}
        | {"onednn": _onednn(torch), "cpu kernels": _cpu_kernels(torch)},
        "attention": _attention(torch, devices),
    }


def _hardware(devices: Sequence[DeviceInfo]) -> dict[str, str]:
    """For each kernel library's module that no device here can run: the device that it needs."""
    from lightx2v.mm.adapter import VendorLibrary
    from lightx2v.mm.libraries import LIBRARIES

    vendors = [library for library in map(LIBRARIES.__getitem__, LIBRARIES) if isinstance(library, VendorLibrary)]
    lacking = {vendor.module: [vendor.hardware(device) for device in devices] for vendor in vendors}
    return {module: reasons[0] for module, reasons in lacking.items() if all(reasons) and reasons[0]}


def _attention(torch_entry: dict[str, str | None], devices: Sequence[DeviceInfo]) -> dict[str, dict[str, str | None]]:
    """Every attention backend: the version of the package that it calls, or of torch, or why none works here."""
    if torch_entry["version"] is None:
        return {"torch_sdpa": torch_entry}
    from lightx2v.attention.base import ATTENTION

    library = lru_cache(maxsize=None)(_library)  # several backends share a package, whose import takes seconds
    entries = {}
    for name in ATTENTION:
        backend = ATTENTION[name]
        lacking = [backend.needs(device) for device in devices]
        needs = lacking[0] if all(lacking) else None
        if backend.function is not None:
            module = backend.function.module
            entries[name] = library(module, needs)
            if entries[name]["version"] is None:
                continue
            # Only now, for this imports it here: it may be too old, or lack the function.
            reasons = [backend.available(device) for device in devices]
            if all(reasons):
                entries[name] = _entry(module, None, reasons[0])
        else:
            reasons = [_NO_DEVICE if needs else backend.missing(device) for device in devices]
            reason = reasons[0] if all(reasons) else None
            version = f"downloads {backend.repository}" if backend.repository else torch_entry["version"]
            remedy = install_hint("kernels") if backend.repository else _COMPILER
            entries[name] = {
                "version": None if reason else version,
                "reason": reason,
                "install": remedy if reason and not needs else None,
                "needs": needs,
            }
    return entries


def _entry(
    module: str, version: str | None, reason: str | None, needs: str | None = None, installed: bool = False
) -> dict[str, str | None]:
    install = install_hint(module) if reason and not installed else None
    return {"version": version, "reason": reason, "install": install, "needs": needs}


def _package(module: str) -> dict[str, str | None]:
    found = probe(module)
    return _entry(module, found.version, found.reason)


def _library(module: str, needs: str | None = None) -> dict[str, str | None]:
    """Like `_package`, and imports it in another process: a kernel library built for another torch may even crash."""
    found = probe(module)
    if found.version is None:
        return _entry(module, None, found.reason, needs)
    if needs:  # its import says nothing then: many fail where there is no device for them
        return _entry(module, None, f"{found.version} is installed, but {_NO_DEVICE}", needs, True)
    command = [sys.executable, "-c", f"import {module}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return _entry(module, None, f"{found.version} is installed, but its import takes over {_IMPORT_SECONDS} s")
    if run.returncode != 0:
        said = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return _entry(module, None, f"{found.version} is installed, but its import fails: {said}")
    return _entry(module, found.version, None)


def _onednn(torch_entry: dict[str, str | None]) -> dict[str, str | None]:
    """oneDNN comes inside torch, which knows its version only in the text of its build configuration."""
    if torch_entry["version"] is None:
        return torch_entry
    import torch

    version = re.search(r"MKL-DNN\)? v(\S+)", torch.__config__.show())
    return _entry("torch", version[1] if version else None, None if version else "this torch is built without it")


def _cpu_kernels(torch_entry: dict[str, str | None]) -> dict[str, str | None]:
    """The kernels of `lightx2v.native`, compiled now if they are not yet."""
    if torch_entry["version"] is None:
        return torch_entry
    from lightx2v.native.build import kernels

    found = kernels()
    products = [name for name, works in (("int8", found.int8), ("bfloat16", found.bfloat16)) if works]
    version = f"compiled for this CPU, with products of {' and '.join(products) or 'no type'}"
    remedy = "install g++ or clang++" if found.reason else None
    return {"version": None if found.reason else version, "reason": found.reason, "install": remedy, "needs": None}


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"lightx2v {report['lightx2v']}, python {report['python']}", "", "devices"]
    for device in report["devices"]:
        capability = ".".join(map(str, device["capability"] or ()))
        title = device["name"] + (f", compute capability {capability}" if capability else "")
        free, total = device["free_memory"] / 2**30, device["total_memory"] / 2**30
        lines.append(f"  {device['torch_name']:<28} {title}, {free:.1f} of {total:.1f} GiB free")
    for group, heading in (("packages", "packages"), ("kernels", "kernel libraries"), ("attention", "attention")):
        lines += ["", heading]
        for name, entry in report[group].items():
            needs = entry["needs"] and f"needs {entry['needs']}"
            there = "; ".join(filter(None, (entry["version"], entry["reason"], needs, entry["install"])))
            lines.append(f"  {_TITLES.get(name, name):<28} {there}")
    return "\n".join(lines)
