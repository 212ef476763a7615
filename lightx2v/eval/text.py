"""An evaluation as text."""

from __future__ import annotations

from lightx2v.eval.compare import Comparison
from lightx2v.eval.results import Report, Result
from lightx2v.units import human_bytes

LISTED = 10
"""Wrong clips, and layers, that are listed."""


def table(report: Report) -> str:
    """What the clips show and how far they are from the reference's."""
    lines = _adherence(report) if report.judged else [f"{len(report.results)} clips"]
    if report.distances:
        lines.append(_distance_line(report))
        lines.append(_temporal_line(report))
    seconds = f"seconds per clip {report.seconds_per_clip:.2f}"
    if report.reference_seconds_per_clip is not None:
        seconds += f", of the reference {report.reference_seconds_per_clip:.2f}"
    lines.append(seconds)
    wrong = [result for result in report.results if result.wrong]
    lines += [f"wrong: {_describe(result)}" for result in wrong[:LISTED]]
    if len(wrong) > LISTED:
        lines.append(f"and {len(wrong) - LISTED} more")
    return "\n".join(lines)


def summary(found: Comparison) -> str:
    """`table`, and where the error comes from."""
    lines = [table(found.report)]
    if found.steps is not None:
        shown = ", ".join(f"{error:.3g}" for error in found.steps.mean)
        lines.append(f"error of the latents by step ({len(found.steps.by_case)} clips): {shown}")
    if found.layers is not None:
        layers = found.layers
        looked = f"{layers.cases} clips, steps {', '.join(str(step + 1) for step in layers.steps)}"
        lines.append(f"error of the linears by themselves ({looked}):")
        lines += [
            f"  {kind:<24} {count:>3} layers, mean {mean:.4f}, largest {largest:.4f}"
            for kind, (count, mean, largest) in layers.kinds().items()
        ]
        lines += [f"  {layer.error:.4f}  {layer.name}  ({layer.mm_type})" for layer in layers.layers[:LISTED]]
        if layers.others:
            lines.append(f"  other parameters that differ: {len(layers.others)}, such as {layers.others[0]}")
    if found.reference is not None:
        mine, other = (sum(side.weight_bytes.values()) for side in (found.tested, found.reference))
        lines.append(f"weights {human_bytes(mine)}, of the reference {human_bytes(other)}")
    lines += [f"no {what}: {reason}" for what, reason in found.unavailable.items()]
    return "\n".join(lines)


def _adherence(report: Report) -> list[str]:
    count, right = len(report.judged), report.right()
    paired = report.paired_adherence()
    base = report.right(reference=True) if paired else None
    lines = [f"{'':<12}{'right':>7}{'of':>7}{'share':>9}" + (f"{'reference':>14}" if base else "")]
    for name, n in right.items():
        row = f"{name:<12}{n:>7}{count:>7}{n / count:>9.1%}"
        lines.append(row + (f"{base[name] / count:>14.1%}" if base else ""))
    if paired:
        lines.append(
            f"clip by clip: {paired['lost']} lost, {paired['gained']} gained,"
            f" {paired['points_lost']:.1f} points lost (standard error {paired['points_lost_error']:.1f})"
        )
    return lines


def _distance_line(report: Report) -> str:
    found = report.distance_summary()
    parts = []
    if found["psnr_mean"] is not None:
        parts.append(f"PSNR mean {found['psnr_mean']:.2f} dB, lowest {found['psnr_min']:.2f} dB")
    parts.append(f"SSIM mean {found['ssim_mean']:.4f}, lowest {found['ssim_min']:.4f}")
    parts.append(f"MS-SSIM mean {found['ms_ssim_mean']:.4f}, lowest {found['ms_ssim_min']:.4f}")
    if found["lpips_mean"] is not None:
        parts.append(f"LPIPS mean {found['lpips_mean']:.4f}, highest {found['lpips_max']:.4f}")
    if found["equal_clips"]:
        parts.append(f"{found['equal_clips']} clips equal")
    return "against the reference: " + "; ".join(parts)


def _temporal_line(report: Report) -> str:
    found = report.distance_summary()
    if found["flicker_mean"] is None:
        return "single frames: nothing changes with time"
    parts = []
    if found["temporal_psnr_mean"] is not None:
        parts.append(f"PSNR mean {found['temporal_psnr_mean']:.2f} dB, lowest {found['temporal_psnr_min']:.2f} dB")
    parts.append(f"flicker {found['flicker_mean']:+.3f} of 255 levels")
    return "changes from frame to frame: " + "; ".join(parts)


def _describe(result: Result) -> str:
    saw = ", ".join(f"{name} {getattr(result.found, name) or 'unclear'}" for name in result.wrong)
    return f"'{result.case.prompt}', seed {result.case.seed}: {saw}"
