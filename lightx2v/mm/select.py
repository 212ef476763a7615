"""Which library computes each layer, and why. A named library is used or refused; only "auto" chooses by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import takewhile

from loguru import logger

from lightx2v.config.schema import MMRule
from lightx2v.errors import ConfigError
from lightx2v.mm.base import NOT_COMPUTED
from lightx2v.mm.libraries import LIBRARIES, servers, unavailable
from lightx2v.mm.measured import ranking
from lightx2v.mm.scheme import LIBRARY_TOKENS, Scheme
from lightx2v.platform import DeviceInfo


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one linear layer is computed. `mm_type` is the name that was asked for, `scheme` what it came to."""

    name: str
    mm_type: str
    scheme: Scheme
    library: str
    reason: str
    in_features: int
    out_features: int


def plan_layer(
    name: str, mm_type: str, scheme: Scheme, n: int, k: int, *, device: DeviceInfo, fallback: bool
) -> LayerPlan:
    """Plan the linear layer `name` with a weight [n, k]. Raises ConfigError when its library cannot compute it."""
    if scheme.library == "custom":
        return LayerPlan(name, mm_type, scheme, "custom", "a class registered for this mm_type", k, n)
    if scheme.library == "torch":
        return LayerPlan(name, mm_type, scheme, "torch", "not quantized", k, n)
    library, reason = choose(scheme, n, k, device, fallback, name)
    return LayerPlan(name, mm_type, scheme.with_library(library), library, reason, k, n)


def choose(scheme: Scheme, n: int, k: int, device: DeviceInfo, fallback: bool, layer: str) -> tuple[str, str]:
    """The library for `scheme` and a weight [n, k], and why it. Raises ConfigError that lists every reason against."""
    wanted, scheme = scheme.library, scheme.served
    problem = "" if wanted == "auto" else unavailable(wanted, scheme, n, k, device)
    if problem is None:
        return wanted, f"named: {LIBRARIES[wanted].describe(scheme, device)}"
    verdicts = servers(scheme, n, k, device)
    able = [library for library, reason in verdicts.items() if reason is None]
    against = [f"{library}: {reason}" for library, reason in verdicts.items() if reason and library != wanted]
    if able and (wanted == "auto" or fallback):
        seconds = ranking(scheme, able, n, k, device) if wanted == "auto" else {}
        order = [*seconds, *(library for library in able if library not in seconds)]
        chosen = order[0]
        how = LIBRARIES[chosen].describe(scheme.with_library(chosen), device)
        if wanted == "auto":
            passed = takewhile(lambda each: each[1], verdicts.items())
            better = [f"{library}: {reason}" for library, reason in passed if reason != NOT_COMPUTED]
            return chosen, "; ".join([f"auto: {how}", *_second(order, seconds), *better])
        _warn_once(f"{scheme.name}: computed by {chosen} instead of {wanted}, which cannot ({problem})")
        return chosen, f"fallback from {wanted} ({problem}): {how}"
    reasons = "; ".join([*([f"{wanted}: {problem}"] if problem else []), *against])
    offers = [f"{scheme.with_library(library).name} (library {LIBRARY_TOKENS[library][1]})" for library in able]
    raise ConfigError(
        "mm_type",
        f"layer '{layer}': '{scheme.name}' cannot be computed: {reasons}",
        allowed=", ".join(offers) or "Default, and int8, fp8, fp8-b128 with library torch or reference",
        do="name an allowed one, or set mm_config.fallback to true" if offers else "name another mm_type",
    )


def _second(order: Sequence[str], seconds: Mapping[str, float]) -> list[str]:
    """The library that comes next, and how much more time it was measured to take."""
    if len(order) < 2:
        return []
    first, second = order[:2]
    if second not in seconds:
        return [f"second best {second}"]
    return [f"second best {second}, measured to take {seconds[second] / seconds[first]:.1f}x as long"]


def code_bytes(plan: LayerPlan, device: DeviceInfo) -> float:
    """Bytes per weight of a quantized layer on `device`, once its library has packed it."""
    return LIBRARIES[plan.library].code_bytes(plan.scheme, device)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def match_rules(names: Iterable[str], default: str, rules: Sequence[MMRule]) -> tuple[dict[str, str], list[MMRule]]:
    """The mm_type of each layer name, and the rules that matched no name. The last rule that matches a name counts.

    A rule is a glob on the whole name, or "re:" and a regular expression for the whole name.
    """
    tests = [(rule, matcher(rule.match)) for rule in rules]
    types: dict[str, str] = {}
    used: set[int] = set()
    for name in names:
        types[name] = default
        for index, (rule, matches) in enumerate(tests):
            if matches(name):
                types[name] = rule.mm_type
                used.add(index)
    return types, [rule for index, rule in enumerate(rules) if index not in used]


def matcher(pattern: str) -> Callable[[str], object]:
    """Whether a name matches a glob, or "re:" and a regular expression. Raises ConfigError for one that is none."""
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern)
    try:
        return re.compile(pattern[3:]).fullmatch
    except re.error as error:
        raise ConfigError("mm_config.rules", f"'{pattern}' is no regular expression: {error}") from error
