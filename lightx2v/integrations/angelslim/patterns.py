"""AngelSlim's rules on names of layers: which are quantized."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightx2v.errors import ConfigError

Pattern = str | re.Pattern[str]

INCLUDE: tuple[str, ...] = ("wrapped_module", "block", "lin", "img", "txt")
EXCLUDE: tuple[str, ...] = ("embed",)
"""What AngelSlim takes where the caller gives no list."""

_SPECIAL = frozenset("*+?^${}[]|()\\")


@dataclass(frozen=True)
class NameFilter:
    """A layer is quantized when no `exclude` is found in its full name, and some `include`; all where that is empty."""

    include: tuple[re.Pattern[str], ...]
    exclude: tuple[re.Pattern[str], ...]

    @staticmethod
    def of(include: Sequence[Pattern], exclude: Sequence[Pattern]) -> NameFilter:
        """Raises ConfigError for what is no pattern, and for a single string in place of a list."""
        return NameFilter(_compiled("include_patterns", include), _compiled("exclude_patterns", exclude))

    def __call__(self, name: str) -> bool:
        """Whether the layer `name` is quantized."""
        return self.against(name) is None

    def against(self, name: str) -> str | None:
        """Why the layer `name` is not quantized; None when it is."""
        hit = next((pattern for pattern in self.exclude if pattern.search(name)), None)
        if hit is not None:
            return f"excluded by '{hit.pattern}'"
        if self.include and not any(pattern.search(name) for pattern in self.include):
            return "matches no pattern of include_patterns"
        return None


def compile_pattern(pattern: Pattern) -> re.Pattern[str]:
    """What is searched for in a name: a compiled pattern as it is, with its own flags; a string whatever its case.

    A string with one of `* + ? ^ $ { } [ ] | ( ) \\` is a regular expression, any other is searched for as it stands.
    That goes for dots too, and a number at an end of a name with dots is a whole one: 'block.1' is not in 'block.10'.
    Raises ConfigError.
    """
    if isinstance(pattern, re.Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise ConfigError("patterns", f"{pattern!r} is no pattern", allowed="strings and compiled regular expressions")
    if not _SPECIAL.intersection(pattern):
        before, after = (r"(?<!\d)" if pattern[:1].isdigit() else "", r"(?!\d)" if pattern[-1:].isdigit() else "")
        literal = re.escape(pattern)
        return re.compile(f"{before}{literal}{after}" if "." in pattern else literal, re.IGNORECASE)
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError("patterns", f"'{pattern}' is no regular expression: {error}") from error


def _compiled(what: str, patterns: Sequence[Pattern]) -> tuple[re.Pattern[str], ...]:
    if isinstance(patterns, str | re.Pattern):
        raise ConfigError(what, f"is the single pattern {patterns!r}", do="give a list of patterns")
    return tuple(map(compile_pattern, patterns))
