"""The world of tiny-wan, drawn by code: one coloured shape on a plain background, moving in one of seven ways.

Shapes of tensors: B clips, T frames, H and W pixels; a clip batch is [B, 3, T, H, W] float32 in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "orange": (245, 130, 25),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "white": (243, 243, 243),
    "gray": (128, 128, 128),
}
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "stays still")

#: Travel of a moving shape over the whole clip, as a share of the picture's side.
TRAVEL = 0.375
#: Radius of a shape that keeps its size, and the two ends of one that grows or shrinks, as shares of the side.
RADIUS, RADIUS_SMALL, RADIUS_LARGE = 0.19, 0.11, 0.26
#: Half-width of the uniform jitter of a clip's centre, as a share of the side.
JITTER = 0.0625


@dataclass(frozen=True, slots=True)
class Scene:
    """What one clip shows; `dx` and `dy` shift its centre, both in units of the picture's side."""

    color: str
    shape: str
    background: str
    motion: str
    dx: float = 0.0
    dy: float = 0.0

    @property
    def prompt(self) -> str:
        return f"a {self.color} {self.shape} on a {self.background} background {self.motion}"


def all_scenes() -> list[Scene]:
    """Every combination of the four attributes (378), centred."""
    return [Scene(c, s, b, m) for c in COLORS for s in SHAPES for b in BACKGROUNDS for m in MOTIONS]


def random_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """`count` scenes with uniform attributes and a jittered centre, reproducible from `generator`."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def shift() -> float:
        return float(torch.rand((), generator=generator) * 2 - 1) * JITTER

    return [
        Scene(pick(tuple(COLORS)), pick(SHAPES), pick(tuple(BACKGROUNDS)), pick(MOTIONS), shift(), shift())
        for _ in range(count)
    ]


def _distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to the outline (negative inside); areas of the three shapes are about equal."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * 0.89
    # An equilateral triangle that points up, as the largest of its three half-plane distances.
    inradius = radius * 0.78
    slanted = x.abs() * (3**0.5 / 2) - y * 0.5
    return torch.maximum(slanted, y) - inradius


def render(scenes: list[Scene], frames: int = 17, size: int = 64) -> Tensor:
    """Draw the scenes with anti-aliased edges; returns [B, 3, frames, size, size] float32 in [-1, 1]."""
    grid = torch.arange(size, dtype=torch.float32) + 0.5
    along = torch.linspace(0, 1, frames) if frames > 1 else torch.full((1,), 0.5)
    clips = []
    for scene in scenes:
        cx = torch.full((frames,), 0.5 + scene.dx)
        cy = torch.full((frames,), 0.5 + scene.dy)
        radius = torch.full((frames,), RADIUS)
        way = (along - 0.5) * TRAVEL
        match scene.motion:
            case "moves left":
                cx = cx - way
            case "moves right":
                cx = cx + way
            case "moves up":
                cy = cy - way
            case "moves down":
                cy = cy + way
            case "grows":
                radius = RADIUS_SMALL + (RADIUS_LARGE - RADIUS_SMALL) * along
            case "shrinks":
                radius = RADIUS_LARGE + (RADIUS_SMALL - RADIUS_LARGE) * along
        x = grid[None, None, :] - (cx * size)[:, None, None]
        y = grid[None, :, None] - (cy * size)[:, None, None]
        distance = _distance(scene.shape, x, y, (radius * size)[:, None, None])
        cover = (0.5 - distance).clamp(0, 1)  # [T, H, W]
        ink = torch.tensor(COLORS[scene.color], dtype=torch.float32)[:, None, None, None]
        paper = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32)[:, None, None, None]
        clips.append(paper + (ink - paper) * cover)
    return torch.stack(clips) / 127.5 - 1
