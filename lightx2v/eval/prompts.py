"""The sentences that tiny-wan was trained on, and what each of them asks for."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from lightx2v.errors import ConfigError

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("black", "white", "gray")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "stays still")

ATTRIBUTES = ("color", "shape", "background", "motion")
"""The fields of a `Scene`, which the detector reports under the same names."""

_SENTENCE = re.compile(
    rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) on an? ({'|'.join(BACKGROUNDS)}) background ({'|'.join(MOTIONS)})"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """One object, its background and what it does."""

    color: str
    shape: str
    background: str
    motion: str

    @property
    def prompt(self) -> str:
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.shape} on a {self.background} background {self.motion}"


@dataclass(frozen=True, slots=True)
class Case:
    """One clip to make: what it is asked for by, and the seed of the noise that it starts from."""

    prompt: str
    seed: int
    scene: Scene | None = None
    """What the prompt describes, if it is a sentence of this world."""


def parse_prompt(prompt: str) -> Scene:
    """The scene that `prompt` describes. Raises ConfigError when it is not a sentence of this world."""
    found = _SENTENCE.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if not found:
        raise ConfigError(
            "prompt",
            f"'{prompt}' is not a sentence of the tiny-wan world",
            allowed="a {color} {shape} on a {background} background {motion}",
        )
    return Scene(*found.groups())


def draw_prompts(count: int, seed: int = 0) -> list[Case]:
    """`count` cases with uniform attributes and seeds of their own; the first ones do not depend on `count`."""
    if count < 1:
        raise ConfigError("prompts", f"{count} prompts asked for", allowed="1 or more")
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        scene = Scene(rng.choice(COLORS), rng.choice(SHAPES), rng.choice(BACKGROUNDS), rng.choice(MOTIONS))
        cases.append(Case(scene.prompt, rng.randrange(2**31), scene))
    return cases
