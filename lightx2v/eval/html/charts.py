"""The plots of a page: a dot a clip, lines by step, bars and a map by layer. Every mark has its numbers as a title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightx2v.eval.html.markup import Markup, joined, tag
from lightx2v.eval.html.svg import (
    CHARACTER,
    Scale,
    drawing,
    text,
    titled,
    whole_ticks,
    widened,
    x_axis,
    y_axis,
)

WIDTH, HEIGHT = 600.0, 280.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 16.0, 40.0, 48.0
ROW, BAR = 22.0, 14.0
CELL = 26.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A number, and what is told of it."""

    value: float
    title: str


def dots(marks: Sequence[Mark], y_name: str, x_name: str, limit: float | None = None) -> Markup:
    """One dot a mark, sorted, with the mean as a line and, where there is one, the limit."""
    ordered = sorted(marks, key=lambda mark: mark.value)
    values = [mark.value for mark in ordered]
    mean = sum(values) / len(values)
    bounds = [values[0], values[-1], *([limit] if limit is not None else [])]
    y = Scale(*widened(min(bounds), max(bounds)), HEIGHT - BOTTOM, TOP)
    x = Scale(0.5, len(values) + 0.5, LEFT, WIDTH - RIGHT - 70)
    radius = max(2.5, min(5.0, 300 / len(values)))
    lines = [_level(y, mean, f"mean {mean:.2f}", "mean")]
    if limit is not None:
        lines.append(_level(y, limit, f"limit {limit:g}", "limit", below=abs(y(limit) - y(mean)) < 14))
    circles = [
        tag("circle", titled(mark.title), cx=x(number), cy=y(mark.value), r=radius, class_="dot")
        for number, mark in enumerate(ordered, 1)
    ]
    ticks = whole_ticks(1, len(values))
    axes = (y_axis(y, LEFT, WIDTH - RIGHT - 70, y_name), x_axis(x, HEIGHT - BOTTOM, x_name, ticks, x.end))
    return drawing(WIDTH, HEIGHT, f"{y_name} of every clip", *axes, *lines, *circles)


def _level(y: Scale, value: float, name: str, class_: str, below: bool = False) -> Markup:
    right = WIDTH - RIGHT - 70
    line = tag("line", titled(name), x1=LEFT, x2=right, y1=y(value), y2=y(value), class_=class_)
    return joined([line, text(right + 6, y(value) + (15 if below else 4), name, class_=f"{class_} label")])


def lines(mean: Sequence[float], by_case: Sequence[tuple[str, Sequence[float]]], y_name: str, x_name: str) -> Markup:
    """A thin line a case and a bold one for their mean, by step from 1 on. Cases have a name."""
    steps = len(mean)
    largest = max(max(values) for _, values in by_case)
    y = Scale(0, widened(0, largest)[1], HEIGHT - BOTTOM, TOP)
    right = WIDTH - RIGHT - 70
    x = Scale(1, max(steps, 2), LEFT + 8, right - 8)

    def path(values: Sequence[float]) -> str:
        return " ".join(f"{x(step):.6g},{y(value):.6g}" for step, value in enumerate(values, 1))

    thin = [
        tag("polyline", titled(name), points=path(values), class_="case")
        for name, values in by_case
        if len(by_case) > 1
    ]
    bold = tag("polyline", titled("mean"), points=path(mean), class_="line")
    points = [
        tag("circle", titled(f"step {step}: {value:.4g}"), cx=x(step), cy=y(value), r=4, class_="dot")
        for step, value in enumerate(mean, 1)
    ]
    name = text(
        right + 6, y(mean[-1]) + 4, f"mean {mean[-1]:.3g}" if len(by_case) > 1 else f"{mean[-1]:.3g}", class_="label"
    )
    axes = (y_axis(y, LEFT, right, y_name), x_axis(x, HEIGHT - BOTTOM, x_name, whole_ticks(1, steps), right))
    return drawing(WIDTH, HEIGHT, f"{y_name} by step", *axes, *thin, bold, *points, name)


def bars(rows: Sequence[tuple[str, Mark]], x_name: str) -> Markup:
    """A bar a row with its name before and its value behind it."""
    left = max(len(name) for name, _ in rows) * (CHARACTER + 0.6) + 12
    largest = max(mark.value for _, mark in rows)
    x = Scale(0, widened(0, largest)[1] if largest else 1, left, max(WIDTH, left + 300) - 60)
    height = len(rows) * ROW
    parts: list[Markup] = []
    for tick in x.ticks:
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=0, y2=height, class_="grid"))
        parts.append(text(x(tick), height + 17, f"{tick:.4g}", "middle", "tick"))
    for number, (name, mark) in enumerate(rows):
        top = number * ROW + (ROW - BAR) / 2
        width = max(x(mark.value) - left, 1)
        parts.append(text(left - 8, top + 11, name, "end", "name"))
        parts.append(tag("path", titled(mark.title), d=_bar(left, top, width, BAR), class_="bar"))
        parts.append(text(left + width + 6, top + 11, f"{mark.value:.4f}", class_="label"))
    parts.append(text((left + x.end) / 2, height + 36, x_name, "middle", "axis"))
    return drawing(x.end + 60, height + 44, x_name, *parts)


def _bar(x: float, y: float, width: float, height: float) -> str:
    """A bar whose far end is round."""
    r = min(3.0, width)
    top, end = f"M{x:g},{y:g}h{width - r:g}", f"h-{width - r:g}z"
    return f"{top}a{r:g},{r:g} 0 0 1 {r:g},{r:g}v{height - 2 * r:g}a{r:g},{r:g} 0 0 1 -{r:g},{r:g}{end}"


def heatmap(rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[str, str], Mark], name: str) -> Markup:
    """A map of `cells` by (row, column): the stronger the color, the larger the value; below it the range of values."""
    left = max(map(len, rows)) * (CHARACTER + 0.6) + 12
    largest = max(mark.value for mark in cells.values()) or 1.0
    side = max(10.0, min(CELL, (WIDTH - left) / len(columns)))
    parts = [text(left - 8, r * CELL + 17, row, "end", "name") for r, row in enumerate(rows)]
    for (row, column), mark in cells.items():
        corner = (left + columns.index(column) * side + 1, rows.index(row) * CELL + 1)
        shade = 0.06 + 0.94 * mark.value / largest
        box = {"x": corner[0], "y": corner[1], "width": side - 2, "height": CELL - 2, "rx": 2}
        parts.append(tag("rect", titled(mark.title), fill_opacity=shade, class_="cell", **box))
    bottom = len(rows) * CELL
    every = -(-len(columns) * 26 // int(side * len(columns)))
    parts += [
        text(left + (c + 0.5) * side, bottom + 15, column.rpartition(".")[2], "middle", "tick")
        for c, column in enumerate(columns)
        if c % every == 0
    ]
    parts.append(text(left + len(columns) * side / 2, bottom + 34, "block", "middle", "axis"))
    for number in range(5):
        shade = 0.06 + 0.94 * number / 4
        box = {"x": left + number * 22, "y": bottom + 48, "width": 20, "height": 12, "rx": 2}
        parts.append(tag("rect", fill_opacity=shade, class_="cell", **box))
    parts.append(text(left - 8, bottom + 58, "0", "end", "tick"))
    parts.append(text(left + 116, bottom + 58, f"{largest:.3g}  {name}", class_="tick"))
    return drawing(max(left + len(columns) * side, left + 300), bottom + 66, name, *parts)
