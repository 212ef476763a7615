"""Which features do not go together, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.features.offload.choose import check_settings

_INSIDE = ("fora", "pab")
"""Caches that leave out parts of a block."""
_PREFIX = ("fbcache", "dbcache")
"""Caches that run the first blocks, and by what they give decide on the others."""


@dataclass(frozen=True)
class Conflict:
    """Two settings that exclude each other."""

    first: str
    second: str
    holds: Callable[[Config], bool]
    """Whether a configuration has both."""
    reason: str


CONFLICTS = (
    Conflict(
        "cache.type",
        "compile",
        lambda config: config.cache.type in _INSIDE and config.compile,
        "leaves out parts of a block, which compile makes one graph",
    ),
    Conflict(
        "cache.type",
        "graphs",
        lambda config: config.cache.type in (*_INSIDE, *_PREFIX) and config.graphs,
        "runs parts of what a graph records as a whole",
    ),
    Conflict(
        "offload.granularity",
        "cache.type",
        lambda config: _streams(config, "phase") and config.cache.type in _INSIDE,
        "moves the weights of a part of a block when it is called, and the cache calls a stand-in for it",
    ),
)
"""Beside those that a section finds in itself: `features.offload.choose.check_settings`, `sampling.build`."""


def _streams(config: Config, granularity: str) -> bool:
    return config.offload.enabled is True and config.offload.granularity == granularity


def check_together(config: Config) -> None:
    """Raise ConfigError for the first pair of settings that do not go together."""
    check_settings(config.offload, compiled=config.compile, graphs=config.graphs)
    for conflict in CONFLICTS:
        if conflict.holds(config):
            raise ConfigError(
                conflict.first,
                f"{_value(config, conflict.first)} does not go with {conflict.second} "
                f"{_value(config, conflict.second)}: it {conflict.reason}",
                do="leave one of them out",
            )


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return str(value).lower() if isinstance(value, bool) else value
