"""Which clips an evaluation makes, from what the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.eval.prompts import Case, Scene, draw_prompts, parse_prompt

COUNT = 200
"""Prompts that are drawn when nobody says how many."""


def make_cases(
    config: Config,
    *,
    given: Sequence[str] = (),
    prompts: str | None = None,
    seeds: str | None = None,
    seed: int = 0,
    world: bool = False,
) -> list[Case]:
    """The clips to make, each prompt with each seed.

    `given` are prompts; `prompts` is a file of them, one a line, or how many sentences of tiny-wan's world to draw with
    `seed`. Without either: as many as `COUNT` where the model is of this world (`world`), else the configuration's
    prompt. `seeds` are numbers with commas or from-to ("0,1" or "0-3"); without them drawn sentences have seeds of
    their own and other prompts the configuration's. Raises ConfigError.
    """
    numbers = parse_seeds(seeds) if seeds is not None else None
    texts = list(given)
    count = int(prompts) if prompts is not None and prompts.strip().lstrip("-").isdigit() else None
    if count is not None and count < 1:
        raise ConfigError("--prompts", f"{count}", allowed="1 or more, or a file")
    if prompts is not None and count is None:
        texts += _read(prompts)
    drawn: list[Case] = []
    if count is not None or (world and not texts):
        drawn = draw_prompts(count or COUNT, seed)
    elif not texts and config.prompt:
        texts = [config.prompt]
    if not texts and not drawn:
        raise ConfigError("--prompts", "there is no prompt", do="give --prompt TEXT, or --prompts FILE with one a line")
    cases = [Case(case.prompt, number, case.scene) for case in drawn for number in numbers or (case.seed,)]
    return cases + [
        Case(text, number, _scene(text) if world else None) for text in texts for number in numbers or (config.seed,)
    ]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Numbers with commas, and ranges that include both ends. Raises ConfigError."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(
                "--seeds", f"'{part}' in '{text}' is no seed", allowed="numbers and ranges, '0,1' or '0-3'"
            )
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _read(file: str) -> list[str]:
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            "--prompts", f"'{file}' cannot be read: {reason}", allowed="a number, or a file with a prompt a line"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _scene(text: str) -> Scene | None:
    try:
        return parse_prompt(text)
    except ConfigError:
        return None
