"""Draws the scenes of the tiny-wan world, for tests of what looks at them."""

from __future__ import annotations

import numpy as np

from lightx2v.eval.prompts import Scene

RGB = {
    "red": (230, 30, 30),
    "green": (30, 180, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 225, 40),
    "purple": (150, 40, 190),
    "orange": (250, 140, 20),
}
GRAY = {"black": 8, "gray": 128, "white": 247}
FRAMES, SIZE, FINE = 17, 64, 4


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A clip, uint8 [T, H, W, 3], sampled at 4x4 points per pixel."""
    points = (np.arange(SIZE * FINE) + 0.5) / FINE
    x, y = np.meshgrid(points, points)
    path = rng.uniform(8, 24)
    center = rng.uniform(30, 34, 2)
    step = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}.get(
        scene.motion, (0, 0)
    )
    small, large = rng.uniform(6, 8), rng.uniform(12, 16)
    sizes = {"grows": (small, large), "shrinks": (large, small)}.get(scene.motion, (rng.uniform(7, 14),) * 2)
    frames = []
    for t in np.linspace(0, 1, FRAMES):
        u, v = x - center[0] - step[0] * path * (t - 0.5), y - center[1] - step[1] * path * (t - 0.5)
        r = sizes[0] + (sizes[1] - sizes[0]) * t
        if scene.shape == "circle":
            inside = u**2 + v**2 < r**2
        elif scene.shape == "square":
            inside = np.maximum(abs(u), abs(v)) < 0.9 * r
        else:
            inside = (v < r) & (abs(u) < (v + r) / 2)
        cover = inside.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3))[..., None]
        frames.append(cover * np.array(RGB[scene.color]) + (1 - cover) * GRAY[scene.background])
    return np.stack(frames)
