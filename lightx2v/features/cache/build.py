"""From the `cache` section of a configuration to a method, or to an error before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loguru import logger

from lightx2v.config.features import CacheConfig
from lightx2v.errors import ConfigError
from lightx2v.features.cache import adacache, dbcache, easycache, fbcache, fora, magcache, pab, taylorseer
from lightx2v.features.cache.calibration import Calibration
from lightx2v.features.cache.coefficients import Ratios, lookup
from lightx2v.features.cache.custom import Custom
from lightx2v.features.cache.facts import Facts
from lightx2v.features.cache.gate import CfgGate
from lightx2v.features.cache.recall import BranchCache
from lightx2v.features.cache.report import Cache
from lightx2v.features.cache.store import Holding
from lightx2v.features.cache.teacache import TeaCache
from lightx2v.models.base import Branch

Options = Mapping[str, Any]
"""The options that are set, by name."""

_TEACACHE = ("threshold", "coefficients", "use_ret_steps", "file")
READS: dict[str, tuple[str, ...]] = {
    "teacache": _TEACACHE,
    "custom": _TEACACHE,
    "magcache": ("threshold", "max_skip", "retention", "ratios", "file", "taylor", "cfg_separate"),
    "taylorseer": ("interval", "order", "warmup", "lite"),
    "fbcache": ("threshold", "taylor", "cfg_separate"),
    "dbcache": (
        *("threshold", "first_blocks", "last_blocks", "warmup", "max_cached", "max_continuous"),
        *("taylor", "cfg_separate"),
    ),
    "adacache": ("codebook", "motion", "cfg_separate"),
    "easycache": ("threshold", "warmup"),
    "fora": ("interval",),
    "pab": ("interval", "window"),
}
"""The options that each method reads, beside `type`, `store`, `cfg_gate` and `cfg_interval`."""

LARGEST_THRESHOLD = {"teacache": 2.0, "custom": 2.0}
"""Of the methods that sum up what a polynomial makes of a change; of the others it is 1."""
MEASURE = "measure it: lightx2v calibrate --cache --save FILE, with the same model_path and task; then set cache.file"


def build(section: CacheConfig, facts: Facts) -> Cache | None:
    """The method that `section` asks for; None for none.

    Raises ConfigError for options that the method does not read or cannot have, and where a model has no coefficients.
    """
    given = {name: value for name, value in section if name not in ("type", "store") and value is not None}
    gate, gate_interval = given.pop("cfg_gate", None), given.pop("cfg_interval", None)
    cache = None
    if section.type != "none":
        _check(section, given)
        holding = Holding(facts.dtype, section.store)
        cache = _MAKERS[section.type](holding, given, facts)
    elif given:
        logger.warning("cache.type is none: cache.{} has no effect", ", cache.".join(given))
    if gate is None:
        if gate_interval is not None:
            raise ConfigError("cache.cfg_interval", "is set without cache.cfg_gate", do="set both, or remove it")
        return cache
    if not facts.cfg:
        raise ConfigError("cache.cfg_gate", "is set, but the request runs no classifier-free guidance", do="remove it")
    return CfgGate(gate, cache, gate_interval)


def _check(section: CacheConfig, given: Options) -> None:
    method = section.type
    if method not in READS:
        raise ConfigError("cache.type", f"{method} is not for a native transformer", allowed=", ".join(READS))
    for name in given:
        if name not in READS[method]:
            raise ConfigError(
                f"cache.{name}", f"is not read by {method}", allowed=", ".join(READS[method]), do=f"remove cache.{name}"
            )
    largest = LARGEST_THRESHOLD.get(method, 1.0)
    if given.get("threshold", 0) > largest:
        raise ConfigError("cache.threshold", f"is {given['threshold']} for {method}", allowed=f"0 to {largest:g}")
    if section.store == "fp8" and (method == "easycache" or section.lite):
        raise ConfigError("cache.store", f"is fp8: {method} keeps latents, which are small", do="remove cache.store")


def _calibration(given: Options, facts: Facts) -> Calibration | None:
    if "file" not in given:
        return None
    calibration = Calibration.read(given["file"])
    calibration.check(facts, given["file"])
    return calibration


def _one_source(given: Options, name: str) -> None:
    if name in given and "file" in given:
        raise ConfigError("cache.file", f"is set beside cache.{name}", do="remove one of them")


def _coefficients(given: Options, facts: Facts) -> tuple[float, ...]:
    """The polynomial: the configuration's, the calibration's, or the published one."""
    _one_source(given, "coefficients")
    ret_steps = bool(given.get("use_ret_steps"))
    if ret_steps and not facts.time_signal:
        raise ConfigError("cache.use_ret_steps", "is for models whose signal is the time embedding", do="remove it")
    if "coefficients" in given:
        found = _chosen("cache.coefficients", given["coefficients"], 0 if ret_steps else 1)
    elif (known := _calibration(given, facts) or lookup(facts)) is not None:
        found = known.blocks_signal if ret_steps else known.head
    else:
        found = ()
    if not found:
        kind = f" with use_ret_steps {str(ret_steps).lower()}" if facts.time_signal else ""
        raise ConfigError("cache.coefficients", f"there are none for this model ({facts}){kind}", do=MEASURE)
    return found


def _chosen(where: str, value: tuple[Any, ...], index: int) -> tuple[float, ...]:
    """`value` where it is a list of numbers; one of its two lists otherwise."""
    if all(isinstance(entry, int | float) for entry in value):
        return tuple(value)
    if len(value) != 2 or not all(isinstance(entry, tuple) for entry in value):
        raise ConfigError(where, f"has {len(value)} entries", allowed="a list of numbers, or two such lists")
    chosen: tuple[float, ...] = value[index]
    return chosen


def _ratios(given: Options, facts: Facts) -> Ratios:
    _one_source(given, "ratios")
    branches: tuple[Branch, ...] = ("cond", "uncond")
    if "ratios" in given:
        found: Ratios = {name: _chosen("cache.ratios", given["ratios"], i) for i, name in enumerate(branches)}
    elif (known := _calibration(given, facts) or lookup(facts)) is not None:
        found = known.ratios
    else:
        found = {}
    if not found.get("cond") or (facts.cfg and not found.get("uncond")):
        raise ConfigError("cache.ratios", f"there are none for this model ({facts})", do=MEASURE)
    if any(ratio <= 0 for numbers in found.values() for ratio in numbers):
        raise ConfigError("cache.ratios", "has numbers that are not above 0", do="check them")
    return found


def _some(given: Options, *names: str) -> dict[str, Any]:
    """Those of the options that are set, as arguments."""
    return {name: given[name] for name in names if name in given}


def _reuse(given: Options) -> dict[str, Any]:
    """What is reused, and by whose decision."""
    return {"order": int(given.get("taylor", False)), "separate": bool(given.get("cfg_separate", False))}


def _tea(make: type[TeaCache]) -> Callable[[Holding, Options, Facts], Cache]:
    def maker(holding: Holding, given: Options, facts: Facts) -> Cache:
        options = _some(given, "threshold", "use_ret_steps")
        return make(holding, _coefficients(given, facts), time_signal=facts.time_signal, **options)

    return maker


def _mag(holding: Holding, given: Options, facts: Facts) -> Cache:
    options = _some(given, "threshold", "max_skip", "retention")
    return magcache.MagCache(holding, _ratios(given, facts), **options, **_reuse(given))


def _taylor(holding: Holding, given: Options, facts: Facts) -> Cache:
    make = taylorseer.TaylorSeerLite if given.get("lite") else taylorseer.TaylorSeer
    return make(holding, **_some(given, "interval", "order", "warmup"))


def _first_block(holding: Holding, given: Options, facts: Facts) -> Cache:
    _check_blocks(1, 0, facts)
    return fbcache.FBCache(holding, **_some(given, "threshold"), **_reuse(given))


def _dual_block(holding: Holding, given: Options, facts: Facts) -> Cache:
    # The default of 8 is meant for stacks of some dozens.
    first = given.get("first_blocks", min(dbcache.FIRST_BLOCKS, max(facts.blocks // 3, 1)))
    _check_blocks(first, given.get("last_blocks", dbcache.LAST_BLOCKS), facts)
    options = _some(given, "threshold", "last_blocks", "warmup", "max_cached", "max_continuous")
    return dbcache.DBCache(holding, first_blocks=first, **options, **_reuse(given))


def _check_blocks(first: int, last: int, facts: Facts) -> None:
    if first + last >= facts.blocks:
        raise ConfigError(
            "cache.first_blocks",
            f"{first} first and {last} last blocks are all of {facts.blocks}",
            allowed=f"fewer than {facts.blocks} in all",
        )


def _ada(holding: Holding, given: Options, facts: Facts) -> Cache:
    if "codebook" in given:
        bounds, lengths = zip(*given["codebook"], strict=True) if given["codebook"] else ((), ())
        if not bounds or list(bounds) != sorted(set(bounds)) or min(lengths) < 1:
            raise ConfigError(
                "cache.codebook",
                f"{[list(pair) for pair in given['codebook']]} is none",
                allowed="pairs of a change, rising, and of the steps to the next computed one, 1 or more",
            )
    separate = _reuse(given)["separate"]
    return adacache.AdaCache(holding, **_some(given, "codebook", "motion"), separate=separate)


def _easy(holding: Holding, given: Options, facts: Facts) -> Cache:
    return easycache.EasyCache(**given)


def _pab(holding: Holding, **given: Any) -> BranchCache:
    low, high = given.get("window", pab.WINDOW)
    if low >= high:
        raise ConfigError("cache.window", f"is {low:g} to {high:g}", allowed="two timesteps, the smaller one first")
    return pab.Pab(holding, **given)


def _branch(make: Callable[..., BranchCache]) -> Callable[[Holding, Options, Facts], Cache]:
    def maker(holding: Holding, given: Options, facts: Facts) -> Cache:
        cache = make(holding, **given)
        if not facts.recallable.intersection(cache.kinds):
            raise ConfigError("cache.type", f"{cache.method}: the blocks of {facts.family} offer nothing to recall")
        return cache

    return maker


_MAKERS: dict[str, Callable[[Holding, Options, Facts], Cache]] = {
    "teacache": _tea(TeaCache),
    "custom": _tea(Custom),
    "magcache": _mag,
    "taylorseer": _taylor,
    "fbcache": _first_block,
    "dbcache": _dual_block,
    "adacache": _ada,
    "easycache": _easy,
    "fora": _branch(fora.Fora),
    "pab": _branch(_pab),
}
