"""The frames that a page shows: of the first clips and of the worst, a few each; all others are forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from PIL import Image

from lightx2v.eval.metrics import Clip
from lightx2v.eval.results import Result

FRAMES = 4
"""Of each clip."""
MAX_SIDE = 480
"""Pixels of the longer side of a picture; larger frames are shown smaller."""
LOSSLESS_SIDE = 160
"""Up to so many pixels a picture is stored as PNG, above as WebP."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Frames of one clip, uint8 [F, H, W, 3], and those of the reference's."""

    number: int
    """Of the case, from 1."""
    result: Result
    frames: tuple[int, ...]
    """Their numbers in the clip, from 1."""
    tested: Clip
    reference: Clip | None

    @property
    def difference(self) -> Clip | None:
        """Absolute differences, by channel."""
        if self.reference is None:
            return None
        made: Clip = np.abs(self.tested.astype(np.int16) - self.reference).astype(np.uint8)
        return made


@dataclass
class Album:
    """Takes every clip, keeps the `first` ones and the `worst`, those of the lowest PSNR."""

    first: int = 4
    worst: int = 4
    kept: list[Shown] = field(default_factory=list)
    lowest: list[Shown] = field(default_factory=list)
    _seen: int = 0

    def add(self, result: Result, clip: Clip, reference: Clip | None) -> None:
        """As `suite.OnClip`."""
        self._seen += 1
        picked = np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int))
        other = None if reference is None else reference[picked].copy()
        shown = Shown(self._seen, result, tuple(int(i) + 1 for i in picked), clip[picked].copy(), other)
        if len(self.kept) < self.first:
            self.kept.append(shown)
        if result.distance is not None and self.worst:
            self.lowest = sorted([*self.lowest, shown], key=_psnr)[: self.worst]

    def pages(self) -> tuple[list[Shown], list[Shown]]:
        """The first clips, and the worst that are not among them, the worst first."""
        numbers = {shown.number for shown in self.kept}
        return self.kept, [shown for shown in self.lowest if shown.number not in numbers]


def _psnr(shown: Shown) -> float:
    assert shown.result.distance is not None
    return shown.result.distance.psnr


def amplification(shown: Sequence[Shown]) -> int:
    """What differences are multiplied by: the power of two, up to 64, that leaves all but 1 % of them unclipped."""
    differences = [s.difference for s in shown]
    values = [float(np.quantile(d, 0.99)) for d in differences if d is not None]
    largest = max(values, default=0.0)
    return int(2 ** np.clip(np.floor(np.log2(255 / largest)), 0, 6)) if largest else 1


def amplified(difference: Clip, factor: int) -> Clip:
    """`difference` times `factor`, at most 255."""
    made: Clip = np.minimum(difference.astype(np.int32) * factor, 255).astype(np.uint8)
    return made


def encode(frame: Clip) -> tuple[bytes, str]:
    """One frame, uint8 [H, W, 3], as the bytes of a file and its MIME type."""
    picture = Image.fromarray(frame)
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
    stream = BytesIO()
    if max(picture.size) <= LOSSLESS_SIDE:
        picture.save(stream, "PNG", optimize=True)
        return stream.getvalue(), "image/png"
    picture.save(stream, "WEBP", quality=90)
    return stream.getvalue(), "image/webp"
