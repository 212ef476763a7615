"""HTML and SVG as text in which whatever comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
VOID = frozenset({"br", "hr", "img", "meta"})
"""Elements that have no end."""


class Markup(str):
    """Text that is markup already."""


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """The element `name` with `children`, of which those that are no `Markup` are escaped.

    An attribute's name has its last underscore taken off and others become dashes (class_, stroke_width); one whose
    value is None is left out.
    """
    written = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """One after the other; what is no `Markup` is escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part, quote=False) for part in parts))


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
