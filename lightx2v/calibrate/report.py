"""What a calibration tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightx2v.units import human_bytes


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer."""

    mm_type: str
    error: float
    """|y_q - y| / |y| on inputs that were seen."""
    told: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """One calibration. Bytes are those of the files; memory is the peak of the whole process."""

    output: str
    mm_type: str
    prompts: int
    layers: Mapping[str, LayerReport]
    seconds: float
    peak_memory_bytes: int
    bytes_out: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def together(reports: Mapping[str, Report], output: str) -> Report:
    """One report of several models by name, which is put before those of their layers."""
    first = next(iter(reports.values()))
    return Report(
        output,
        first.mm_type,
        first.prompts,
        {f"{name}.{layer}": one for name, report in reports.items() for layer, one in report.layers.items()},
        sum(report.seconds for report in reports.values()),
        max(report.peak_memory_bytes for report in reports.values()),
        sum(report.bytes_out for report in reports.values()),
    )


def render(report: Report, target: Mapping[str, Any] | None = None) -> str:
    """The report as text, with what was chosen for a target."""
    errors = sorted(report.layers.items(), key=lambda item: -item[1].error)
    lines = [
        f"{len(errors)} layers quantized with {report.prompts} prompts in {report.seconds:.0f} s,"
        f" peak memory {human_bytes(report.peak_memory_bytes)}; {human_bytes(report.bytes_out)} in {report.output}",
        "error of a layer's results, the largest:",
    ]
    if target is not None:
        counts = ", ".join(f"{count} {name}" for name, count in target["layers"].items())
        lines.insert(
            0,
            f"chosen: {counts}; {target['bits_per_weight']:.2f} bits a weight; predicted"
            f" {target['predicted_psnr']:.2f} dB, measured {target['measured_psnr']:.2f}"
            f" ± {target['standard_error']:.2f} dB",
        )
    lines += [f"  {layer.error:8.4f}  {name}  {layer.mm_type}" for name, layer in errors[:10]]
    return "\n".join(lines)
