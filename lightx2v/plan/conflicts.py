"""Which features do not go together, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightx2v.config.features import CacheConfig
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.features.offload.choose import check_settings
from lightx2v.mm.scheme import Scheme, parse

_INSIDE = ("fora", "pab")
"""Caches that leave out parts of a block."""


@dataclass(frozen=True)
class Conflict:
    """Two settings that exclude each other."""

    first: str
    second: str
    holds: Callable[[Config], bool]
    """Whether a configuration has both."""
    reason: str
    do: str = "leave one of them out"


def _ratios_of_other_steps(config: Config) -> bool:
    """Whether MagCache's ratios were not measured at the timesteps of a step list, as far as can be seen here."""
    cache, listed = config.cache, config.sampling.denoising_step_list
    return cache.type == "magcache" and listed is not None and cache.file is None and _steps_of(cache) != len(listed)


def _steps_of(cache: CacheConfig) -> int | None:
    """The steps that the ratios of a configuration were measured at: one number for each."""
    if not cache.ratios:
        return None
    first = cache.ratios[0]
    return len(first) if isinstance(first, tuple) else len(cache.ratios)


def varies(scheme: Scheme) -> bool:
    """Whether the kernels that a layer runs on depend on the step, or on what its input holds."""
    activation = scheme.activation
    return activation is not None and (activation.granularity == "step" or activation.outliers > 0)


CONFLICTS = (
    Conflict(
        "mm_config.mm_type",
        "graphs",
        lambda config: config.graphs and varies(parse(config.mm_config.mm_type)),
        "computes other things at other steps, and a recorded graph always does the same",
    ),
    Conflict(
        "cache.type",
        "graphs",
        lambda config: config.cache.type in _INSIDE and config.graphs,
        "computes parts of a block at some steps and not at others, and a recorded graph always does the same",
    ),
    Conflict(
        "cache.type",
        "sampling.denoising_step_list",
        _ratios_of_other_steps,
        "goes by ratios from step to step, which hold for the steps that they were measured at",
        do="measure them with the list: lightx2v calibrate --cache, then set cache.file; or take another cache",
    ),
)
"""Beside those that a section finds in itself: `features.offload.choose.check_settings`, `features.cache.build`,
`sampling.build`."""


def check_together(config: Config) -> None:
    """Raise ConfigError for the first pair of settings that do not go together, on whatever device and model."""
    check_settings(config.offload, compiled=config.compile, graphs=config.graphs)
    for conflict in CONFLICTS:
        if conflict.holds(config):
            raise ConfigError(
                conflict.first,
                f"{_value(config, conflict.first)} does not go with {conflict.second} "
                f"{_value(config, conflict.second)}: it {conflict.reason}",
                do=conflict.do,
            )


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, tuple):
        return list(value)
    return str(value).lower() if isinstance(value, bool) else value
