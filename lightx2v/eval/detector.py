"""Says what a clip shows, from its pixels alone.

It knows nothing of how a clip was made: no prompt, no renderer, no model. Shapes: T frames, H rows, W columns.

Shape is told by harmonic moments of the coverage around its centroid, `sum(coverage * (x + iy)^n)`. The functions
(x + iy)^n are harmonic, so an isotropic blur leaves these moments unchanged (mean value property): a soft, small
square still reads as a square. Order 3 separates a triangle from the others, order 4 a square from a circle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_BACKGROUNDS = {"black": 0.0, "gray": 128.0, "white": 255.0}
_HUES = {"red": 0.0, "orange": 32.0, "yellow": 57.0, "green": 120.0, "blue": 230.0, "purple": 288.0}
"""Degrees on the colour wheel."""

MIN_CONTRAST = 40.0
"""Distance in RGB (0..441) that an object must have from its background to count as one."""
MIN_SATURATION = 0.25
MIN_AREA = 8.0
"""Pixels of a 64 px frame below which a frame counts as empty."""
MIN_SHIFT = 3.0
"""Pixels of a 64 px frame that a centroid must travel from the first to the last frame to count as moving."""
MIN_GROWTH = 0.22
"""Change of log(radius) from the first to the last frame that counts as growing or shrinking."""
SHIFT_PER_GROWTH = 2.0
"""A change of radius wins over a shift of the centroid up to this many times as long."""

_TRIANGLE_3 = (4 / 27**0.5) ** 1.5 / 10
"""|moment 3| / area^2.5 of an equilateral triangle; 0 for a circle and for a square."""
_SQUARE_4 = 1 / 60
"""|moment 4| / area^3 of a square; 0 for a circle."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What a clip shows; None for what cannot be told."""

    background: str
    color: str | None
    shape: str | None
    motion: str | None
    shift: tuple[float, float] = (0.0, 0.0)
    """Travel of the centroid (right, down) in pixels, first to last frame, by a line fitted to all frames."""
    growth: float = 0.0
    """Change of log(radius), first to last frame, by a line fitted to all frames."""


def detect(frames: NDArray[np.uint8]) -> Detection:
    """What `frames` (uint8 [T, H, W, 3]) show. Raises ValueError for any other shape or dtype."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames: got {frames.dtype} {list(frames.shape)}; wanted uint8 [T, H, W, 3]")
    pixels = frames.astype(np.float64)
    ground = _border_color(pixels)
    background = min(_BACKGROUNDS, key=lambda name: abs(_BACKGROUNDS[name] - float(ground.mean())))
    smooth = _box3(pixels)
    coverage = _coverage(pixels, smooth, ground)
    if coverage is None:
        return Detection(background, None, None, None)
    scale = min(frames.shape[1:3]) / 64
    area = coverage.sum((1, 2))
    seen = area >= MIN_AREA * scale**2
    if not seen.any():
        return Detection(background, None, None, None)
    color = _color(smooth[coverage > 0.5])
    centers = _centroids(coverage[seen])
    shape = _shape(coverage[seen], centers)
    times = np.flatnonzero(seen).astype(np.float64)
    shift, growth, motion = _motion(times, centers, area[seen], len(frames), scale)
    return Detection(background, color, shape, motion, shift, growth)


def _border_color(pixels: Floats) -> Floats:
    """Median RGB of the outermost two pixels of all frames."""
    inner = np.zeros(pixels.shape[1:3], dtype=bool)
    inner[2:-2, 2:-2] = True
    return np.asarray(np.median(pixels[:, ~inner].reshape(-1, 3), axis=0))


def _box3(images: Floats) -> Floats:
    """3x3 mean over axes 1 and 2, with the edges repeated."""
    for axis in (1, 2):
        width = [(1, 1) if a == axis else (0, 0) for a in range(images.ndim)]
        padded = np.pad(images, width, mode="edge")
        size = images.shape[axis]
        images = np.stack([np.take(padded, range(k, k + size), axis=axis) for k in range(3)]).mean(0)
    return images


def _coverage(pixels: Floats, smooth: Floats, ground: Floats) -> Floats | None:
    """How much of each pixel the object covers, 0..1 [T, H, W]; None where nothing differs from the background.

    It is the distance from the background's colour, as a share of the object's own; the same for an object of one
    colour as its place between the two, and right for one of several. Only the largest connected piece of a frame
    counts, with a margin of three pixels for its soft edge.
    """
    distance = np.linalg.norm(pixels - ground, axis=-1)
    smooth_distance = np.linalg.norm(smooth - ground, axis=-1)
    peak = float(np.quantile(smooth_distance, 0.998))
    if peak < MIN_CONTRAST:
        return None
    full = float(np.median(smooth_distance[smooth_distance > 0.5 * peak]))
    piece = _largest_pieces(smooth_distance > 0.5 * full)
    for _ in range(3):
        piece = _dilate(piece)
    empty = distance[smooth_distance < 0.2 * full]
    noise = float(np.median(empty)) if empty.size else 0.0
    alpha = np.clip((distance - noise) / (full - noise), 0.0, 1.0)
    return np.where(piece & (smooth_distance > 0.08 * full), alpha, 0.0)


def _dilate(masks: Mask) -> Mask:
    """Each mask [T, H, W] and its four neighbours."""
    out = masks.copy()
    out[:, 1:] |= masks[:, :-1]
    out[:, :-1] |= masks[:, 1:]
    out[:, :, 1:] |= masks[:, :, :-1]
    out[:, :, :-1] |= masks[:, :, 1:]
    return out


def _largest_pieces(masks: Mask) -> Mask:
    """The largest 4-connected piece of each mask [T, H, W]."""
    left, best = masks.copy(), np.zeros_like(masks)
    frames = np.arange(len(masks))
    while left.any():
        flat = left.reshape(len(masks), -1)
        seed = np.zeros_like(flat)
        seed[frames, flat.argmax(1)] = flat.any(1)
        piece = seed.reshape(masks.shape)
        while True:
            grown = _dilate(piece) & left
            if np.array_equal(grown, piece):
                break
            piece = grown
        larger = piece.sum((1, 2)) > best.sum((1, 2))
        best[larger] = piece[larger]
        left &= ~piece
        left[left.sum((1, 2)) <= best.sum((1, 2))] = False
    return best


def _centroids(coverage: Floats) -> Floats:
    """Centre of mass (x, y) of each frame, [T, 2]."""
    rows, columns = np.mgrid[: coverage.shape[1], : coverage.shape[2]]
    area = coverage.sum((1, 2))
    return np.stack([(coverage * columns).sum((1, 2)) / area, (coverage * rows).sum((1, 2)) / area], axis=1)


def _shape(coverage: Floats, centers: Floats) -> str:
    """The shape seen over all frames; frames where the object is cut by the edge count only when all are."""
    edge = np.concatenate([coverage[:, [0, -1]].max(2), coverage[:, :, [0, -1]].max(1)], axis=1).max(1)
    whole = edge < 0.4
    if whole.any():
        coverage, centers = coverage[whole], centers[whole]
    rows, columns = np.mgrid[: coverage.shape[1], : coverage.shape[2]]
    z = (columns - centers[:, 0, None, None]) + 1j * (rows - centers[:, 1, None, None])
    area = coverage.sum((1, 2))
    weights = area / area.sum()
    three = abs((weights * (coverage * z**3).sum((1, 2)) / area**2.5).sum()) / _TRIANGLE_3
    four = abs((weights * (coverage * z**4).sum((1, 2)) / area**3).sum()) / _SQUARE_4
    if three > 0.5:
        return "triangle"
    return "square" if four > 0.5 else "circle"


def _motion(
    times: Floats, centers: Floats, area: Floats, length: int, scale: float
) -> tuple[tuple[float, float], float, str | None]:
    """(shift, growth, name) from lines fitted over time; the name is None when the object is seen in one frame only."""
    if length == 1 or len(times) < 2:
        return (0.0, 0.0), 0.0, None
    radius = np.sqrt(area / np.pi)
    dx, dy, dr = ((length - 1) * np.polyfit(times, np.column_stack([centers, radius]), 1)[0]).tolist()
    growth = dr / float(radius.mean())
    shift = max(abs(dx), abs(dy))
    if abs(growth) > MIN_GROWTH and abs(dr) * SHIFT_PER_GROWTH > shift:
        name = "grows" if growth > 0 else "shrinks"
    elif shift < MIN_SHIFT * scale:
        name = "stays still"
    elif abs(dx) >= abs(dy):
        name = "moves right" if dx > 0 else "moves left"
    else:
        name = "moves down" if dy > 0 else "moves up"
    return (dx, dy), growth, name


def _color(rgb: Floats) -> str | None:
    """The name that most of the pixels [N, 3] have, by the nearest hue; None where most are nearly gray."""
    high, low = rgb.max(1), rgb.min(1)
    spread = np.maximum(high - low, 1e-9)
    colored = high - low >= MIN_SATURATION * np.maximum(high, 1e-9)
    if 2 * colored.sum() <= len(rgb):
        return None
    red, green, blue = ((rgb - low[:, None]) / spread[:, None])[colored].T
    hue = np.where(
        red == 1, 60 * (green - blue), np.where(green == 1, 60 * (blue - red) + 120, 60 * (red - green) + 240)
    )
    turn = (hue[:, None] - np.array(list(_HUES.values())) + 180) % 360 - 180
    votes = np.bincount(np.abs(turn).argmin(1), minlength=len(_HUES))
    return list(_HUES)[int(votes.argmax())]
