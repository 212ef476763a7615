"""The two configurations of an evaluation: which is the plain one of another, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError

EXACT = ("mm_config", "dit_quantized_ckpt", "t5", "clip", "attention", "cache", "offload", "vae", "compile", "graphs")
"""Sections whose defaults leave nothing out and round nothing that the model's dtype does not."""
EXACT_SAMPLING = ("cfg_schedule", "changing_resolution", "resolution_rate", "changing_resolution_steps")


def plain(config: Config) -> Config:
    """The same settings without whatever trades quality for time or memory. LoRAs and the sampler stay."""
    sampling = {name: type(config.sampling).model_fields[name].get_default() for name in EXACT_SAMPLING}
    sections = {name: Config.model_fields[name].get_default() for name in EXACT}
    return config.model_copy(update=sections | {"sampling": config.sampling.model_copy(update=sampling)})


def against(config: Config, file: str | None, sets: Sequence[str]) -> Config:
    """The configuration of `file`, or `config` itself, with the settings `sets` ("key.path=value"). ConfigError."""
    if file is not None:
        return load_config(file, {}, sets)
    # As the file of `config` would have them: a section that `sets` open keeps its other settings.
    return load_config(None, config.model_dump(mode="json", by_alias=True, exclude_defaults=True), sets)


def settings(config: Config) -> dict[str, Any]:
    """Every setting that is not the default's, by dotted key, but for where the result goes."""
    found: dict[str, Any] = {}
    dumped = config.model_dump(mode="json", exclude_defaults=True, exclude={"schema_", "save_result_path"})
    for name, value in dumped.items():
        if isinstance(value, dict) and name != "pipeline_args":
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def differences(tested: Config, reference: Config) -> dict[str, tuple[Any, Any]]:
    """What the two set differently, by dotted key: (tested, reference); None stands for the default."""
    mine, other = settings(tested), settings(reference)
    names = [*mine, *(name for name in other if name not in mine)]
    return {name: (mine.get(name), other.get(name)) for name in names if mine.get(name) != other.get(name)}


def check_comparable(tested: Any, reference: Any) -> None:
    """Raise ConfigError unless the requests of the two plans make clips of one size."""
    for name in ("task", "height", "width", "frames"):
        mine, other = getattr(tested, name), getattr(reference, name)
        if mine != other:
            raise ConfigError(
                "--against",
                f"makes clips of another {name}: {other}, the tested configuration {mine}",
                do="set both alike",
            )
