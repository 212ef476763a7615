"""The page: verdict, frames, plots, tables. One file, which loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lightx2v.errors import ResourceError
from lightx2v.eval.compare import Comparison
from lightx2v.eval.gate import Limits
from lightx2v.eval.html import charts, frames, tables
from lightx2v.eval.html.charts import Mark
from lightx2v.eval.html.markup import DASH, TIMES, Markup, tag
from lightx2v.eval.html.style import STYLE
from lightx2v.eval.pictures import Shown, amplification
from lightx2v.io.files import whole_file

TOP_LAYERS = 20
NAMED = 3
"""Settings that the title names."""


def write_page(path: str, found: Comparison, first: Sequence[Shown], worst: Sequence[Shown], limits: Limits) -> Path:
    """Write the page, whole or not at all. Raises ResourceError."""
    target = Path(path)
    with whole_file(target, error=ResourceError) as temporary:
        temporary.write_text(page(found, first, worst, limits), "utf-8")
    return target


def page(found: Comparison, first: Sequence[Shown], worst: Sequence[Shown], limits: Limits) -> str:
    """The page's text. `first` are the first clips, `worst` those of the lowest PSNR that are not among them."""
    title = f"{_title_of(found)} {DASH} lightx2v eval"
    head = tag("head", tag("meta", charset="utf-8"), *_meta(), tag("title", title), tag("style", Markup(STYLE)))
    body = tag("body", tag("main", *_header(found, limits), _tiles(found), *_sections(found, first, worst, limits)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _meta() -> tuple[Markup, ...]:
    return (tag("meta", name="viewport", content="width=device-width, initial-scale=1"),)


def _title_of(found: Comparison) -> str:
    """What is compared, in a few words."""
    config, reference = found.tested.config, found.reference
    name = _name(config.mm_config.mm_type)
    if reference is None:
        return name
    other = _name(reference.config.mm_config.mm_type)
    if name != other:
        return f"{name} against {other[0].lower() + other[1:] if ' ' in other else other}"
    changed = [f"{key} {tables.value_of(mine)}" for key, (mine, _) in found.differences.items()]
    more = ", ..." if len(changed) > NAMED else ""
    return f"{', '.join(changed[:NAMED])}{more} against the reference" if changed else "The same settings twice"


def _name(mm_type: str) -> str:
    return "The unquantized model" if mm_type == "Default" else mm_type


def _header(found: Comparison, limits: Limits) -> list[Markup]:
    config = found.tested.config
    model = config.model_path or "tiny-wan"
    report = found.report
    what = f"{config.model_cls}, {config.task}, {model}; {len(report.results)} clips, {config.dtype}"
    parts = [tag("h1", _title_of(found)), tag("p", what, class_="soft")]
    if limits.named:
        failures = limits.failures(report)
        verdict = tag("span", "failed" if failures else "passed", class_="fail" if failures else "pass")
        told = "; ".join(failures) or ", ".join(
            f"--{name.replace('_', '-')} {value:g}" for name, value in limits.named.items()
        )
        parts.append(tag("p", verdict, f" {told}"))
    return parts


def _tiles(found: Comparison) -> Markup:
    report = found.report
    summary = report.distance_summary()
    tiles: list[tuple[str, str]] = []
    if report.distances:
        equal = summary["equal_clips"] == len(report.distances)
        tiles.append(("equal" if equal else tables.number(summary["psnr_mean"], 2, " dB"), "mean PSNR"))
        tiles.append(("equal" if equal else tables.number(summary["psnr_min"], 2, " dB"), "lowest PSNR"))
        tiles.append((tables.number(summary["ssim_mean"], 4), "mean SSIM"))
        tiles.append((tables.number(summary["ms_ssim_mean"], 4), "mean MS-SSIM"))
    if summary["lpips_mean"] is not None:
        tiles.append((tables.number(summary["lpips_mean"], 4), "mean LPIPS"))
    if summary["temporal_psnr_mean"] is not None:
        tiles.append((tables.number(summary["temporal_psnr_mean"], 2, " dB"), "PSNR of the changes between frames"))
    points, base = report.points(), report.points(reference=True)
    if points is not None:
        told = "as asked" if found.reference is None else f"as asked (reference {base:.1f} %)"
        tiles.append((f"{points:.1f} %", told))
    mine = sum(found.tested.weight_bytes.values())
    if found.reference is not None and (other := sum(found.reference.weight_bytes.values())):
        tiles.append((f"{mine / other:.2f} {TIMES}", "bytes of the weights"))
    return tag(
        "div", *(tag("div", tag("b", value), tag("span", name), class_="tile") for value, name in tiles), class_="tiles"
    )


def _sections(found: Comparison, first: Sequence[Shown], worst: Sequence[Shown], limits: Limits) -> list[Markup]:
    report = found.report
    made: list[Markup] = []
    factor = amplification([*first, *worst])
    scaled = f"Differences are multiplied by {factor}." if found.reference is not None else ""
    if worst:
        made.append(_section("The worst clips", f"Those of the lowest PSNR. {scaled}", frames.clips(worst, factor)))
    if first:
        made.append(_section("The first clips", scaled, frames.clips(first, factor)))
    if report.distances:
        made.append(_distances(found, limits))
    if report.judged:
        told = _paired(found)
        made.append(_section("What the clips show", told, tables.adherence(report)))
    if found.steps is not None:
        named = [
            (f"{result.case.prompt}, seed {result.case.seed}", errors)
            for result, errors in zip(report.results, found.steps.by_case, strict=False)
        ]
        told = f"||z {DASH} z_ref|| / ||z_ref|| of the latents z after each step; a thin line is a clip."
        plot = charts.lines(found.steps.mean, named, "relative error of the latents", "step")
        made.append(_section("Error by step", told, plot))
    if found.layers is not None:
        made += _layers(found)
    made.append(_section("Sizes and times", "", tables.sizes(found)))
    settings = [tables.configs(found)] if found.reference is not None else []
    settings.append(_folded("other settings", tables.shared(found)))
    made.append(_section("Settings", "", *settings))
    if found.unavailable:
        rows = [(what, why) for what, why in found.unavailable.items()]
        made.append(_section("Not measured", "", tables.table(("", "why"), rows, words=(1,))))
    made.append(_section("Made on", "", tables.environment(found)))
    return made


def _section(title: str, told: str, *content: str) -> Markup:
    words = [tag("p", told, class_="soft")] if told.strip() else []
    return tag("section", tag("h2", title), *words, *content)


def _pair(*content: str) -> Markup:
    """Side by side where there is room."""
    return tag("div", *content, class_="pair")


def _folded(title: str, *content: str) -> Markup:
    return tag("details", tag("summary", title), *content)


def _distances(found: Comparison, limits: Limits) -> Markup:
    report = found.report
    marks = [
        Mark(
            r.distance.psnr,
            f"{r.distance.psnr:.2f} dB, SSIM {r.distance.ssim:.4f}: {r.case.prompt}, seed {r.case.seed}",
        )
        for r in report.results
        if r.distance is not None and math.isfinite(r.distance.psnr)
    ]
    equal = len(report.distances) - len(marks)
    told = "Each clip against the reference's of the same prompt and seed."
    told += f" {equal} clips are equal and have no PSNR." if equal else ""
    plot = [charts.dots(marks, "PSNR, dB", "clips, sorted", limits.min_psnr)] if marks else []
    return _section(
        "Distances", told, _pair(tables.metrics(report), *plot), _folded("every clip", tables.clips(report))
    )


def _paired(found: Comparison) -> str:
    paired = found.report.paired_adherence()
    if paired is None:
        return "Share of the clips in which the detector sees what the prompt asks for."
    return (
        "Share of the clips in which the detector sees what the prompt asks for. Clip by clip:"
        f" {paired['lost']} lost and {paired['gained']} gained, {paired['points_lost']:.1f} points less than the"
        f" reference (standard error {paired['points_lost_error']:.1f})."
    )


def _layers(found: Comparison) -> list[Markup]:
    layers = found.layers
    assert layers is not None
    steps = ", ".join(str(step + 1) for step in layers.steps)
    clips = "1 clip" if layers.cases == 1 else f"{layers.cases} clips"
    told = (
        f"Each linear by itself: ||y {DASH} y_ref|| / ||y_ref|| of its output for the reference's own input, in"
        f" {clips}, step{'s' if len(layers.steps) > 1 else ''} {steps}."
    )
    if layers.others:
        told += (
            f" {len(layers.others)} other parameters differ, such as {layers.others[0]}: layers behind them get inputs"
            " here that they were not made for."
        )
    rows = [(layer.name, Mark(layer.error, _title(layer.name, layer.mm_type, layer.error))) for layer in layers.layers]
    cells = {(r.kind, r.block): Mark(r.error, _title(r.name, r.mm_type, r.error)) for r in layers.layers}
    kinds, blocks = list(layers.kinds()), sorted({layer.block for layer in layers.layers}, key=_by_number)
    count = min(TOP_LAYERS, len(rows))
    ranking = f"The {count} linears with the largest error" if count < len(rows) else "Error by layer"
    return [
        _section(ranking, told, charts.bars(rows[:count], "relative error of the output")),
        _section(
            "Error by kind and block",
            "",
            _pair(charts.heatmap(kinds, blocks, cells, "relative error of the output"), tables.kinds(layers)),
            _folded("every layer", tables.layers(layers)),
        ),
    ]


def _by_number(block: str) -> tuple[str, int]:
    name, _, number = block.rpartition(".")
    return name, int(number or -1)


def _title(name: str, mm_type: str, error: float) -> str:
    return f"{name}, {mm_type}: {error:.5f}"
