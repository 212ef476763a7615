"""Errors that a person reads: where, what, what is allowed, what to do.

Exit codes: 2 for what the user can mend in the command, the config or the files given; 1 for a failure at run time.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LightX2VError(Exception):
    """A failure at run time, told in one to three lines (exit code 1)."""

    exit_code = 1

    def __init__(self, where: str, what: str, *, allowed: str = "", do: str = "") -> None:
        self.where, self.what, self.allowed, self.do = where, what, allowed, do
        lines = [f"{where}: {what}" if where else what]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if do:
            lines.append(f"  do: {do}")
        super().__init__("\n".join(lines))


class UserError(LightX2VError):
    """Something that the user can mend (exit code 2)."""

    exit_code = 2


class ConfigError(UserError):
    """A key or value of the configuration."""


class CheckpointError(UserError):
    """A file of weights that is missing, damaged, or not what the configuration says."""


class MediaError(UserError):
    """A picture or video that cannot be read or written."""


class ResourceError(LightX2VError):
    """Memory or disk that does not suffice."""


def suggestion(word: str, options: Iterable[str]) -> str:
    """` - did you mean 'x'?` for the closest of `options`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" - did you mean '{close[0]}'?" if close else ""
