"""The file that `lightx2v calibrate --cache` writes and `cache.file` names: what was measured of one model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightx2v.errors import ConfigError
from lightx2v.features.cache.coefficients import Ratios
from lightx2v.features.cache.facts import Facts

FORMAT = "lightx2v cache calibration 1"


@dataclass(frozen=True)
class Calibration:
    """TeaCache's polynomials, the coefficient of the highest degree first, and MagCache's ratios."""

    family: str
    task: str
    width: int
    blocks: int
    steps: int
    prompts: int
    head: tuple[float, ...]
    """For the signal without `use_ret_steps`, or the only one; empty where too little was measured to fit it."""
    blocks_signal: tuple[float, ...]
    """For the signal with `use_ret_steps`."""
    ratios: Ratios
    plan: str = ""
    """Hash of the plan that was run."""

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", "utf-8")

    @staticmethod
    def read(path: str | Path) -> Calibration:
        """Raises ConfigError for a file that is no calibration."""
        try:
            content: Any = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ConfigError("cache.file", f"'{path}' cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError("cache.file", f"'{path}' is not JSON: {error}") from error
        try:
            if content.pop("format") != FORMAT:
                raise ValueError(FORMAT)
            content["ratios"] = {branch: _numbers(ratios) for branch, ratios in content["ratios"].items()}
            return Calibration(**{**content, **{name: _numbers(content[name]) for name in ("head", "blocks_signal")}})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "cache.file",
                f"'{path}' is not a calibration of this version",
                do="make one: lightx2v calibrate --cache --save FILE",
            ) from error

    def check(self, facts: Facts, path: str) -> None:
        """Raise ConfigError where another model was measured."""
        measured = (self.family, self.task, self.width, self.blocks)
        if measured != (facts.family, facts.task, facts.width, facts.blocks):
            raise ConfigError(
                "cache.file",
                f"'{path}' was measured with {self.family} {self.task}, width {self.width}, {self.blocks} blocks",
                allowed=f"a calibration of {facts}",
            )


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
