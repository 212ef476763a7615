"""A video as one picture: frames side by side."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FRAMES = 8
GAP = 2
MIN_WIDTH = 128


def contact_sheet(frames: NDArray[np.uint8], columns: int = 4) -> NDArray[np.uint8]:
    """Up to 8 evenly spaced frames of uint8 [T, H, W, 3] in rows of `columns`, with white gaps of 2 pixels.

    Frames narrower than 128 pixels are enlarged by the smallest whole factor that makes them as wide, pixel by pixel.
    """
    total, height, width, _ = frames.shape
    picked = frames[np.linspace(0, total - 1, min(total, FRAMES)).round().astype(int)]
    factor = math.ceil(MIN_WIDTH / width)
    picked = picked.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = min(columns, len(picked))
    rows = math.ceil(len(picked) / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for index, frame in enumerate(picked):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = frame
    return sheet
