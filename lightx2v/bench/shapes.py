"""What `lightx2v bench linear` measures: shapes of weights, and the mm_types of each library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightx2v.bench import work
from lightx2v.errors import ConfigError, suggestion
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import LIBRARY_TOKENS, parse


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight [n, k], and which layer it is."""

    n: int
    k: int
    label: str


def read_shapes(text: str) -> list[Shape]:
    """The shapes behind "wan-1.3b,8960x1536": a model stands for those of its linears. Raises ConfigError."""
    shapes: list[Shape] = []
    for word in text.split(","):
        if match := re.fullmatch(r"(\d+)x(\d+)", word):
            n, k = int(match[1]), int(match[2])
            if not n or not k:
                raise ConfigError("--shapes", f"'{word}' has an empty side", allowed="NxK, both 1 or more")
            shapes.append(Shape(n, k, ""))
        elif word in work.MODELS:
            shapes += _shapes_of(word)
        else:
            known = ", ".join(work.MODELS)
            raise ConfigError(
                "--shapes",
                f"unknown shape '{word}'{suggestion(word, work.MODELS)}",
                allowed=f"{known}, or NxK, such as 8960x1536",
            )
    return shapes


def _shapes_of(model: str) -> list[Shape]:
    _, linears = work.dit_shapes(replace(work.arch_of(model), num_layers=1))
    names: dict[tuple[int, int], list[str]] = {}
    for name, size in linears.items():
        names.setdefault(size, []).append(name.removeprefix("blocks.0."))
    return [
        Shape(n, k, f"{model} {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else ""))
        for (n, k), found in names.items()
    ]


def expand_libraries(mm_types: Sequence[str], libraries: str | None) -> list[str]:
    """`mm_types` with each of `libraries` (a list, or "all" that have an adapter) in place of the one that they name.

    Raises ConfigError, with the closest name, for an unknown library.
    """
    if libraries is None:
        return list(mm_types)
    tokens = [LIBRARY_TOKENS[name][1] for name in LIBRARIES] if libraries == "all" else libraries.split(",")
    known = {spelling: library for library, pair in LIBRARY_TOKENS.items() for spelling in (pair[1], library)}
    crossed: dict[str, None] = {}
    for name in mm_types:
        scheme = parse(name)
        for token in tokens:
            if token not in known:
                raise ConfigError(
                    "--library",
                    f"unknown library '{token}'{suggestion(token, known)}",
                    allowed=f"all, {', '.join(pair[1] for pair in LIBRARY_TOKENS.values())}",
                )
            short = f"{name}-{LIBRARY_TOKENS[known[token]][1]}"
            moved = scheme.with_library(known[token])
            # The short name where there is one: `int8-torch` reads better than its long form.
            quantized = short if scheme.library == "auto" else moved.name
            crossed[name if scheme.weight is None else quantized] = None
    return list(crossed)
