"""The tables of a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightx2v.bench.host import describe
from lightx2v.eval.compare import Comparison
from lightx2v.eval.html.markup import DASH, TIMES, Markup, tag
from lightx2v.eval.layer_report import LayerErrors
from lightx2v.eval.results import Report
from lightx2v.units import human_bytes


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> Markup:
    """A table; the columns `words` hold text, all others but the first numbers."""

    def row(name: str, cells: Sequence[str]) -> Markup:
        made = (tag(name, cell, class_="words" if i in words else None) for i, cell in enumerate(cells))
        return tag("tr", *made)

    inner = (tag("thead", row("th", head)), tag("tbody", *(row("td", cells) for cells in rows)))
    return tag("div", tag("table", *inner), class_="scroll")


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A number, or a dash for None."""
    return DASH if value is None else f"{value:.{digits}f}{unit}"


def metrics(report: Report) -> Markup:
    """Mean and worst clip of every distance."""
    found = report.distance_summary()
    error = found["psnr_error"]
    rows = [
        (
            f"PSNR{'' if error is None else f' (standard error of the mean {error:.2f})'}",
            *_pair(found, "psnr", 2, " dB"),
        ),
        ("SSIM", *_pair(found, "ssim", 4)),
        ("MS-SSIM", *_pair(found, "ms_ssim", 4)),
        ("LPIPS (lower is better)", number(found["lpips_mean"], 4), number(found["lpips_max"], 4)),
        ("PSNR of the changes from frame to frame", *_pair(found, "temporal_psnr", 2, " dB")),
        ("flicker, levels of 255 (0 is as the reference)", *_signed(found["flicker_mean"], found["flicker_max"])),
    ]
    return table(("", "mean", "worst clip"), [row for row in rows if row[1] != DASH])


def _pair(found: dict[str, Any], name: str, digits: int, unit: str = "") -> tuple[str, str]:
    return number(found[f"{name}_mean"], digits, unit), number(found[f"{name}_min"], digits, unit)


def _signed(*values: float | None) -> tuple[str, ...]:
    return tuple(DASH if value is None else f"{value:+.3f}" for value in values)


def adherence(report: Report) -> Markup:
    """How many clips show what was asked for."""
    right, base, count = report.right(), report.right(reference=True), len(report.judged)
    paired = report.paired_adherence()
    head = ("", "tested", *(("reference",) if paired else ()))
    rows = [(name, f"{right[name] / count:.1%}", *((f"{base[name] / count:.1%}",) if paired else ())) for name in right]
    return table(head, rows)


def sizes(found: Comparison) -> Markup:
    """Weights by component, the peak of the plan, and seconds."""
    sides = [found.tested, *([found.reference] if found.reference else [])]
    names = dict.fromkeys(name for side in sides for name in side.weight_bytes)
    rows = [(f"weights of {name}", *(human_bytes(side.weight_bytes.get(name, 0)) for side in sides)) for name in names]
    rows.append(("peak memory of the plan", *(human_bytes(side.plan.memory.peak) for side in sides)))
    seconds = (found.report.seconds_per_clip, found.report.reference_seconds_per_clip)
    rows.append(("seconds per clip", *(number(value, 2) for value in seconds[: len(sides)])))
    rows.append(("plan", *(side.plan.hash for side in sides)))
    return table(("", "tested", "reference")[: len(sides) + 1], rows)


def configs(found: Comparison) -> Markup:
    """What the two configurations set differently."""
    rows = [(name, value_of(mine), value_of(other)) for name, (mine, other) in found.differences.items()]
    return table(("setting", "tested", "reference"), rows or [("none", "", "")], words=(1, 2))


def shared(found: Comparison) -> Markup:
    """The settings that both have, where they are not the defaults."""
    settings = found.tested.to_json()["config"]
    rows = [(name, value_of(value)) for name, value in settings.items() if name not in found.differences]
    return table(("setting", "value"), rows or [("every other one", "default")], words=(1,))


def value_of(value: Any) -> str:
    """A setting as text; None stands for its default."""
    return "default" if value is None else value if isinstance(value, str) else json.dumps(value)


def environment(found: Comparison) -> Markup:
    """Hardware and versions."""
    rows = [("hardware", describe(dict(found.hardware)))]
    return table(("", ""), rows + [(name, version) for name, version in found.versions.items()], words=(1,))


def clips(report: Report) -> Markup:
    """Every clip with its distances, in the order in which they were made."""
    head = ("clip", "prompt", "seed", "PSNR", "SSIM", "MS-SSIM", "LPIPS", "changes", "flicker", "wrong")
    rows = []
    for index, result in enumerate(report.results, 1):
        d = result.distance
        numbers: tuple[str, ...] = (DASH,) * 6
        if d is not None:
            temporal = number(d.temporal_psnr, 2)
            numbers = (
                number(d.psnr, 2),
                number(d.ssim, 4),
                number(d.ms_ssim, 4),
                number(d.lpips, 4),
                temporal,
                *_signed(d.flicker),
            )
        rows.append((str(index), result.case.prompt, str(result.case.seed), *numbers, ", ".join(result.wrong)))
    return table(head, rows, words=(1, 9))


def layers(found: LayerErrors) -> Markup:
    """Every layer with its error, the largest first."""
    head = ("layer", "mm_type", "reference", "shape", "bytes", "error")
    rows = [
        (
            layer.name,
            layer.mm_type,
            layer.reference_mm_type,
            f"{layer.out_features} {TIMES} {layer.in_features}",
            DASH if layer.weight_bytes is None else human_bytes(layer.weight_bytes),
            f"{layer.error:.5f}",
        )
        for layer in found.layers
    ]
    return table(head, rows, words=(1, 2))


def kinds(found: LayerErrors) -> Markup:
    """The same by kind of layer."""
    rows = [
        (kind, str(count), f"{mean:.5f}", f"{largest:.5f}") for kind, (count, mean, largest) in found.kinds().items()
    ]
    return table(("kind", "layers", "mean error", "largest"), rows)
