"""One small typed registry: lazy values, aliases; duplicate and unknown names are refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar, cast

from lightx2v.errors import ConfigError, suggestion

T = TypeVar("T")
V = TypeVar("V")


class Registry(Generic[T]):
    """Names to values, where a value may be given as `"package.module:attribute"` and is imported on first use."""

    def __init__(self, kind: str, beside: Iterable[str] = ()) -> None:
        """`beside` are names of this kind that something else serves: messages list them, too."""
        self.kind, self._beside = kind, tuple(beside)
        self._values: dict[str, T | str] = {}
        self._aliases: dict[str, str] = {}

    def add(self, name: str, value: T | str, aliases: Iterable[str] = ()) -> None:
        """Register `value` (or its lazy path) under `name`. Raises ConfigError when a name is taken."""
        for new in (name, *aliases):
            if new in self._values or new in self._aliases:
                raise ConfigError(self.kind, f"'{new}' is registered already", do="choose another name")
        self._values[name] = value
        for alias in aliases:
            self._aliases[alias] = name

    def __call__(self, name: str, aliases: Iterable[str] = ()) -> Callable[[V], V]:
        """Decorator form of `add`; returns what it decorates unchanged."""

        def register(value: V) -> V:
            self.add(name, cast(T, value), aliases)
            return value

        return register

    def canonical(self, name: str) -> str:
        """The registered name behind `name`. Raises ConfigError, with a suggestion, when there is none."""
        if name in self._values:
            return name
        if name in self._aliases:
            return self._aliases[name]
        raise ConfigError(
            self.kind,
            f"unknown name '{name}'{suggestion(name, [*self._values, *self._aliases, *self._beside])}",
            allowed=", ".join([*self, *self._beside]),
        )

    def __getitem__(self, name: str) -> T:
        key = self.canonical(name)
        value = self._values[key]
        if isinstance(value, str):
            module, _, attribute = value.partition(":")
            value = cast(T, getattr(importlib.import_module(module), attribute))
            self._values[key] = value
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
