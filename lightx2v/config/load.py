"""A Config from a JSON file, the command line and `--set`, in this order of precedence."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger
from pydantic import ValidationError

from lightx2v.config.legacy import RENAMED, UNSUPPORTED, VALUES, WITHOUT_EFFECT, check_off, is_without_effect, show
from lightx2v.config.schema import SECTIONS, SETTINGS, Config
from lightx2v.errors import ConfigError, suggestion


@dataclass
class _Merged:
    """Settings by dotted key, and for each the place and the name under which it was given."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, tuple[str, str]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    without_effect: list[str] = field(default_factory=list)


def load_config(
    path: str | None = None, overrides: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> Config:
    """The settings of the JSON file at `path`, then `overrides`, then `sets` ("key.path=value"); later ones win.

    Keys are dotted ("sampling.steps"), nested, or LightX2V's old ones, which a warning names. Raises ConfigError.
    """
    merged = _Merged()
    if path is not None:
        _add(merged, _read_json(path), path)
    _add(merged, overrides or {}, "arguments")
    _add(merged, dict(_parse_set(text) for text in sets), "--set")
    if merged.renamed:
        names = ", ".join(f"{old} -> {new}" for old, new in merged.renamed.items())
        logger.warning("old names of settings: {}", names)
    if merged.without_effect:
        logger.warning("settings without effect in this version: {}", ", ".join(merged.without_effect))
    return _validate(merged)


def _add(merged: _Merged, raw: Mapping[str, Any], where: str) -> None:
    """Put one source over what is there. Within one source, two names of the same setting must agree."""
    given: dict[str, tuple[str, Any]] = {}
    for key, value in _flatten(raw, where):
        if key in UNSUPPORTED:
            check_off(key, value, where)
            logger.debug("{}: {} is {}, which changes nothing", where, key, show(value))
            continue
        if is_without_effect(key):
            merged.without_effect.append(key)
            continue
        if key == "dit_quantized" and value is True:  # naming a scheme says as much
            continue
        new = RENAMED.get(key, key)
        if new not in SETTINGS:
            raise _unknown_key(key, where)
        meant = _meant(key, value)
        if new in given and merged.values[new] != meant:
            first, before = given[new]
            what = f"{first} is {show(before)}, but {key} is {show(value)}; both set {new}"
            raise ConfigError(where, what, do=f"give '{new}' alone, once")
        if new != key:
            merged.renamed[key] = new
        given[new] = (key, value)
        merged.values[new], merged.origin[new] = meant, (where, key)
    if raw.get("dit_quantized") is True and "mm_config.mm_type" not in given:
        raise ConfigError(where, "dit_quantized is true, but no scheme is named", do="set 'mm_config.mm_type' instead")


def _meant(key: str, value: Any) -> Any:
    """The value of an old `key` as the new one takes it."""
    known = VALUES.get(key, {})
    same = (new for old, new in known.items() if type(old) is type(value) and old == value)
    return next(same, value)


def _flatten(raw: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; sections are opened, everything else is a value."""
    for key, value in raw.items():
        if key not in SECTIONS:
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", v) for inner, v in value.items())
        else:
            allowed = ", ".join(name for name in SETTINGS if name.startswith(key + "."))
            raise ConfigError(where, f"{key} is {show(value)}, which is no object", allowed=allowed)


def _read_json(path: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(path, f"'{twice}' is given twice", do="remove one of them")
        return content

    try:
        content = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise ConfigError(place, f"not JSON: {error.msg}", do="note that JSON has no comments") from error
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}", do="check --config_json") from error
    if not isinstance(content, dict):
        raise ConfigError(path, f"the top level is {type(content).__name__}", allowed="a JSON object")
    return content


def _parse_set(text: str) -> tuple[str, Any]:
    """A key and its value: JSON where it is JSON and the setting is not text, otherwise the string itself."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("--set", f"'{text}' has no key and value", allowed="key.path=value")
    try:
        decoded = json.loads(value)
    except json.JSONDecodeError:
        return key, value
    is_text = key not in VALUES and SETTINGS.get(RENAMED.get(key, key), False)
    return key, value if is_text and not isinstance(decoded, str | None) else decoded


def _unknown_key(key: str, where: str) -> ConfigError:
    meant = {name.rpartition(".")[2]: name for name in SETTINGS} | {name: name for name in SETTINGS} | RENAMED
    meant |= {name: name for name in (*UNSUPPORTED, *WITHOUT_EFFECT, *SECTIONS)}
    close = difflib.get_close_matches(key, meant, n=1)
    hint = suggestion(meant[close[0]], [meant[close[0]]]) if close else ""
    section = key.partition(".")[0] if "." in key else ""
    if section in SECTIONS:
        allowed = [name for name in SETTINGS if name.startswith(section + ".")]
    else:
        allowed = sorted({name.partition(".")[0] for name in SETTINGS} - {"$schema"})
    return ConfigError(where, f"unknown key '{key}'{hint}", allowed=", ".join(allowed))


def _validate(merged: _Merged) -> Config:
    nested: dict[str, Any] = {}
    for key, value in merged.values.items():
        section, dot, inner = key.partition(".")
        if dot:
            nested.setdefault(section, {})[inner] = value
        else:
            nested[key] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        errors = [_as_config_error(dict(detail), merged) for detail in error.errors()]
    raise errors[0] if len(errors) == 1 else ConfigError("", "\n".join(map(str, errors)))


def _as_config_error(detail: dict[str, Any], merged: _Merged) -> ConfigError:
    """One of pydantic's errors, with the place and the name that the user gave."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])[1:]
    key = next(
        name for name in merged.origin if f"{path}.".startswith((f"{name}.", f"{name}[")) or name.startswith(path)
    )
    where, given = merged.origin[key]
    value = show(detail["input"])
    name = path if given == key else f"{given} ({path})"
    message: str = detail["msg"]
    if detail["type"] == "extra_forbidden":
        return ConfigError(where, f"unknown key '{path}'", do="remove it")
    if detail["type"] == "missing":
        return ConfigError(where, f"{path} is missing", do="add it")
    if message.startswith("Input should be "):
        return ConfigError(where, f"{name} is {value}", allowed=message.removeprefix("Input should be "))
    return ConfigError(where, f"{path} is {value}: {message}")
