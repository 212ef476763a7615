"""The detector against clips drawn here, clean and degraded as a generated clip may be."""

from __future__ import annotations

import numpy as np
import pytest

from lightx2v.eval.detector import detect
from lightx2v.eval.prompts import ATTRIBUTES, BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene
from tests.unit.scene_drawing import FRAMES, SIZE, draw


def blur(clip: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur in rows and columns."""
    taps = np.exp(-0.5 * (np.arange(-8, 9) / radius) ** 2)
    taps /= taps.sum()
    for axis in (1, 2):
        padded = np.pad(clip, [(8, 8) if a == axis else (0, 0) for a in range(4)], mode="edge")
        clip = sum(w * np.take(padded, range(k, k + SIZE), axis) for k, w in enumerate(taps))
    return clip


def fade(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Less contrast, a colour cast and a brightness that flickers over time."""
    return 128 + (clip - 128) * 0.8 + rng.uniform(-12, 12, 3) + rng.uniform(-6, 6, (FRAMES, 1, 1, 1))


DAMAGE = {
    "clean": lambda clip, rng: clip,
    "blurred": lambda clip, rng: blur(clip, 1.5),
    "noisy": lambda clip, rng: clip + rng.normal(0, 12, clip.shape),
    "blurred, noisy": lambda clip, rng: blur(clip, 2.0) + rng.normal(0, 8, clip.shape),
    "faded": lambda clip, rng: blur(fade(clip, rng), 1.0) + rng.normal(0, 5, clip.shape),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_at_least_99_percent_of_the_attributes_are_right(damage: str) -> None:
    rng = np.random.default_rng(3)
    scenes = [Scene(c, s, b, m) for c in COLORS for s in SHAPES for b in BACKGROUNDS for m in MOTIONS]
    right = dict.fromkeys(ATTRIBUTES, 0)
    chosen = rng.choice(len(scenes), 120, replace=False)
    for index in chosen:
        scene = scenes[index]
        clip = DAMAGE[damage](draw(scene, rng), rng)
        found = detect(np.clip(np.rint(clip), 0, 255).astype(np.uint8))
        for name in ATTRIBUTES:
            right[name] += getattr(found, name) == getattr(scene, name)
    assert all(count >= 0.99 * len(chosen) for count in right.values()), right


def test_an_empty_clip_shows_a_background_and_nothing_else() -> None:
    noise = np.random.default_rng(0).normal(128, 6, (FRAMES, SIZE, SIZE, 3))
    found = detect(noise.astype(np.uint8))
    assert (found.background, found.color, found.shape, found.motion) == ("gray", None, None, None)


def test_the_colour_is_that_of_most_of_the_object() -> None:
    clip = np.full((FRAMES, SIZE, SIZE, 3), 255, np.uint8)
    clip[:, 20:40, 20:40] = (250, 220, 40)
    clip[:, 20:40, 20:25] = (20, 20, 250)
    found = detect(clip)
    assert (found.color, found.shape) == ("yellow", "square")


def test_pure_noise_is_no_reason_to_fail() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    assert detect(noise).background in BACKGROUNDS
    assert detect((noise > 127).astype(np.uint8) * 255).background in BACKGROUNDS


def test_a_gray_object_has_no_color() -> None:
    clip = np.full((FRAMES, SIZE, SIZE, 3), 255, np.uint8)
    clip[:, 20:40, 20:40] = 90
    found = detect(clip)
    assert (found.color, found.shape, found.motion) == (None, "square", "stays still")


def test_a_still_picture_has_no_motion() -> None:
    clip = draw(Scene("red", "circle", "black", "stays still"), np.random.default_rng(1))[:1]
    assert detect(clip.astype(np.uint8)).motion is None


def test_shift_and_growth_are_in_pixels_and_log_radius() -> None:
    rng = np.random.default_rng(5)
    moving = detect(draw(Scene("red", "square", "white", "moves left"), rng).astype(np.uint8))
    assert -24 <= moving.shift[0] <= -8 and abs(moving.shift[1]) < 0.2
    growing = detect(draw(Scene("red", "square", "white", "grows"), rng).astype(np.uint8))
    assert 0.4 < growing.growth < 1.0


@pytest.mark.parametrize("frames", [np.zeros((64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.float32)])
def test_other_shapes_and_dtypes_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(frames)
