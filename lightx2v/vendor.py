"""Functions of optional packages of kernels: found and imported on use, with a reason where one cannot be called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from lightx2v.platform import install_hint, package_of, probe


@dataclass(frozen=True)
class Loaded:
    """Something called `name` of an optional library: `value` is None exactly when `reason` says why not."""

    value: Any
    reason: str | None
    name: str = ""


@cache
def load(*places: str) -> Loaded:
    """The first of `places`, each "package.module:name", that an installed library has. Never raises.

    Several places are for what a library has moved or renamed, so all of one package. Imports it; a module
    that raises at import, whatever it raises, is remembered and not tried again.
    """
    top = package_of(places[0].partition(":")[0])
    found = probe(top)
    if found.version is None:
        return Loaded(None, f"{top} is {found.reason} ({install_hint(top)})")
    failure = None
    for place in places:
        module, _, name = place.partition(":")
        try:
            value = getattr(importlib.import_module(module), name, None)
        except (Exception, SystemExit) as error:
            # A version without this module is no failure; one that cannot be imported is, whichever module broke it.
            if not (isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")):
                failure = failure or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if value is not None:
            return Loaded(value, None, name)
    if failure:
        return Loaded(None, f"{top} {found.version} is installed, but its import fails: {failure}")
    lacking = " or ".join(dict.fromkeys(place.partition(":")[2] for place in places))
    return Loaded(
        None, f"{top} {found.version} is installed, but has no {lacking} (another version: {install_hint(top)})"
    )


@dataclass(frozen=True)
class Function:
    """A function of an optional package: its first parameters are `positional`, and it takes `keywords`.

    `places` are "package.module:name" in order of preference. `given` are keywords that only some versions take.
    """

    places: tuple[str, ...]
    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    given: tuple[tuple[str, object], ...] = ()

    @property
    def module(self) -> str:
        """The package to install."""
        return package_of(self.places[0].partition(":")[0])

    def find(self) -> Loaded:
        """The function with `given` filled in, or why it cannot be called as this engine would. Never raises."""
        return _find(self)

    def accepts(self, parameters: Collection[str]) -> bool:
        """Whether a function with these parameters, in order, can be called as this engine would."""
        starts = tuple(parameters)[: len(self.positional)] == self.positional
        return starts and all(name in parameters for name in self.keywords)


@cache
def _find(function: Function) -> Loaded:
    loaded = load(*function.places)
    if loaded.value is None:
        return loaded
    try:
        parameters = inspect.signature(loaded.value).parameters
    except (TypeError, ValueError):  # compiled functions need not have one
        return loaded
    if any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters.values()):
        return loaded
    if not function.accepts(parameters):
        module, name = function.module, loaded.name
        wanted = ", ".join((*function.positional, *function.keywords))
        return Loaded(
            None,
            f"{module} {probe(module).version} has a {name}({', '.join(parameters)}), not the one that is called here, "
            f"{name}({wanted}) (another version: {install_hint(module)})",
        )
    given = {name: value for name, value in function.given if name in parameters}
    return replace(loaded, value=partial(loaded.value, **given)) if given else loaded
