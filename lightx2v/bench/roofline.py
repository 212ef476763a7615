"""`lightx2v bench roofline`: what this device can do at most, which other figures are shares of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightx2v.bench.measure import Candidate, Entry, Measured, Skipped, Timing, Work, measure
from lightx2v.bench.report import Case, Column, fact
from lightx2v.errors import ConfigError
from lightx2v.platform import DeviceInfo

_SAMPLE_SECONDS = 0.05
#: Side of the square matrices and bytes of the copy: past the caches, and quick on a CPU.
_SIDES = {"cpu": 1024}
_BYTES = {"cpu": 256 << 20}


@dataclass(frozen=True, slots=True)
class Peaks:
    """The measured ceilings of a device; None where a product cannot be computed there."""

    bytes_per_s: float
    """Bytes read and written by a copy within the device's memory."""
    flops_per_s: dict[str, float]
    """Operations a second of torch's product of square matrices, by dtype: bf16, fp8, int8."""


def _normal(side: int, device: DeviceInfo, seed: int) -> Tensor:
    generator = torch.Generator(device.torch_name).manual_seed(seed)
    return torch.empty(side, side, device=device.torch_name).normal_(generator=generator)


def _copy(device: DeviceInfo) -> Work:
    source = torch.empty(_bytes(device) // 4, device=device.torch_name).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _bf16(device: DeviceInfo) -> Work:
    a, b = (_normal(_side(device), device, seed).bfloat16() for seed in (1, 2))
    return lambda: a @ b


def _fp8(device: DeviceInfo) -> Work:
    a, b = (_normal(_side(device), device, seed).to(torch.float8_e4m3fn) for seed in (1, 2))
    one = torch.ones((), device=a.device)

    def work() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return work


def _int8(device: DeviceInfo) -> Work:
    a, b = (_normal(_side(device), device, seed).mul_(40).clamp_(-127, 127).to(torch.int8) for seed in (1, 2))
    return lambda: torch._int_mm(a, b.t())


def _side(device: DeviceInfo) -> int:
    return _SIDES.get(device.kind, 8192)


def _bytes(device: DeviceInfo) -> int:
    return _BYTES.get(device.kind, 4 << 30)


_WORKS: dict[str, Callable[[DeviceInfo], Work]] = {"copy": _copy, "bf16": _bf16, "fp8": _fp8, "int8": _int8}


def run_roofline(device: DeviceInfo, timing: Timing) -> tuple[Case, dict[str, Any], list[str]]:
    """The case, the peaks as settings, and notes. What the device has no product for is left out with the reason.

    Raises ConfigError where not even a copy can be measured.
    """
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    for name in _WORKS:
        try:
            entries.append(_ceiling(name, device, timing))
        except ConfigError as error:
            if name == "copy":
                raise
            skipped.append(Skipped(name, error.what))
    side, copied = _side(device), _bytes(device)
    measured = Measured(tuple(entries), tuple(entry.name for entry in entries), tuple(skipped))
    case = Case("ceilings of this device", {"side": side, "copied_bytes": copied}, measured, COLUMNS)
    rates = {entry.name: entry.facts.get("flops_per_s", entry.facts.get("bytes_per_s")) for entry in entries}
    notes = [
        f"products of two {side}x{side} matrices of normal values by torch; a copy counts bytes read and bytes written",
        "rates are of the fastest sample, which is what the device can do",
    ]
    return case, {"peaks": rates}, notes


def _ceiling(name: str, device: DeviceInfo, timing: Timing) -> Entry:
    """One entry by itself. ConfigError where the device lacks the product, which torch says with any exception."""
    candidate = Candidate(name, "peer", lambda: (_WORKS[name](device), {}))
    (entry,) = measure([candidate], device, replace(timing, sample_seconds=_SAMPLE_SECONDS)).entries
    if name == "copy":
        return replace(entry, kind="baseline", facts={"bytes_per_s": 2 * _bytes(device) / entry.best})
    return replace(entry, kind="baseline", facts={"flops_per_s": 2 * _side(device) ** 3 / entry.best})


def peaks(device: DeviceInfo, timing: Timing) -> Peaks:
    """The ceilings as numbers."""
    _, settings, _ = run_roofline(device, timing)
    rates = dict(settings["peaks"])
    return Peaks(rates.pop("copy"), rates)


COLUMNS = (
    Column("ms", lambda entry: f"{entry.median * 1e3:.4g}"),
    Column("min ms", lambda entry: f"{entry.best * 1e3:.4g}"),
    fact("GB/s", "bytes_per_s", "{:.1f}", 1e-9),
    fact("TFLOP/s", "flops_per_s", "{:.3f}", 1e-12),
)
