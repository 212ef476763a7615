"""What the plots of a page are made of: scales, ticks and axes. Colors are classes of the page's style sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightx2v.eval.html.markup import Markup, joined, tag

CHARACTER = 6.2
"""Pixels that a character of a label takes, about."""


@dataclass(frozen=True)
class Scale:
    """From values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers between both ends."""
        step = round_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(span: float, about: int = 5) -> float:
    """1, 2 or 5 times a power of ten, of which `span` has about so many."""
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def widened(low: float, high: float) -> tuple[float, float]:
    """Round bounds around two values, which may be the same."""
    if high - low < 1e-12:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = round_step(high - low)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def label(value: float) -> str:
    """A tick's number."""
    return f"{value:.10g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None, **more: str) -> Markup:
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_, **more)


def titled(content: str) -> Markup:
    """What a pointer that rests on an element shows."""
    return tag("title", content)


def drawing(width: float, height: float, name: str, *parts: str) -> Markup:
    """An <svg> of so many pixels at most, with `name` for those who cannot see it."""
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        style=f"max-width:{width:g}px",
        role="img",
        aria_label=name,
        xmlns="http://www.w3.org/2000/svg",
    )


def y_axis(scale: Scale, left: float, right: float, name: str) -> Markup:
    """Horizontal lines at the ticks, their numbers left of them, and above what they count."""
    parts = []
    for tick in scale.ticks:
        y = scale(tick)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(text(left - 8, y + 4, label(tick), "end", "tick"))
    parts.append(text(0, scale.end - 14, name, class_="axis"))
    return joined(parts)


def x_axis(scale: Scale, bottom: float, name: str, ticks: list[float], right: float) -> Markup:
    """A line with the numbers of `ticks` below it, and below these what they count."""
    parts = [tag("line", x1=scale.start, x2=right, y1=bottom, y2=bottom, class_="base")]
    parts += [text(scale(tick), bottom + 17, label(tick), "middle", "tick") for tick in ticks]
    parts.append(text((scale.start + right) / 2, bottom + 36, name, "middle", "axis"))
    return joined(parts)


def whole_ticks(first: int, last: int, about: int = 10) -> list[float]:
    """Whole numbers from `first` to `last`, both among them."""
    if last - first <= about:
        return [float(number) for number in range(first, last + 1)]
    step = max(1, round(round_step(last - first, about)))
    inner = [n for n in range(step, last, step) if n - first > step / 2 and last - n > step / 2]
    return [float(first), *map(float, inner), float(last)]
