"""Distance between two clips, uint8 [T, H, W, 3], a few frames at a time, in whole numbers or float64.

LPIPS, a network, is in float32 and only where its weights are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightx2v.platform import install_hint, probe

Clip = NDArray[np.uint8]
Floats = NDArray[np.float64]
Perceptual = Callable[[Clip, Clip], float]

PEAK = 255.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales of MS-SSIM, from the finest (Wang, Simoncelli and Bovik, 2003)."""
CHUNK = 2**22
"""Numbers of one clip that are looked at together."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a clip is from another of the same prompt and seed."""

    psnr: float
    """dB; infinite when the clips are equal."""
    ssim: float
    ms_ssim: float
    temporal_psnr: float | None
    """dB, between the changes from frame to frame; infinite when these are equal, None for a single frame."""
    flicker: float | None
    """How much more the clip changes from frame to frame than the other, in levels of 0 to 255; None as above."""
    lpips: float | None = None


def measure(clip: Clip, reference: Clip, lpips: Perceptual | None = None) -> Distance:
    """All distances of `clip` from `reference`. Raises ValueError for clips of different sizes."""
    temporal_psnr, flicker = temporal(clip, reference) or (None, None)
    fine, coarse = structure(clip, reference)
    perceptual = None if lpips is None else lpips(clip, reference)
    return Distance(psnr(clip, reference), fine, coarse, temporal_psnr, flicker, perceptual)


def _check(first: Clip, second: Clip) -> None:
    if first.shape != second.shape or first.ndim != 4 or first.dtype != np.uint8 or second.dtype != np.uint8:
        shapes = f"{first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        raise ValueError(f"clips: got {shapes}; wanted two of uint8 [T, H, W, 3]")


def _chunks(first: Clip, second: Clip) -> Iterator[tuple[Clip, Clip]]:
    """The same frames of both clips, a few at a time."""
    frames = max(1, CHUNK // max(1, math.prod(first.shape[1:])))
    for start in range(0, len(first), frames):
        yield first[start : start + frames], second[start : start + frames]


def _decibels(squares: int, count: int) -> float:
    return math.inf if squares == 0 else 10 * math.log10(PEAK**2 * count / squares)


def psnr(first: Clip, second: Clip) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames; infinite for equal clips."""
    _check(first, second)
    squares = 0
    for x, y in _chunks(first, second):
        squares += int(np.square(x.astype(np.int32) - y.astype(np.int32)).sum(dtype=np.int64))
    return _decibels(squares, first.size)


def temporal(first: Clip, second: Clip) -> tuple[float, float] | None:
    """Temporal consistency of `first` with `second`: dB and levels, or None for a single frame.

    With D_t = F_t+1 - F_t, a signed number for each pixel and channel: the PSNR (peak 255) between the D of both clips,
    which a constant error leaves infinite and noise that changes with time does not; and the mean |D| of the first
    less that of the second, which is positive for a clip that flickers more.
    """
    _check(first, second)
    if len(first) < 2:
        return None
    squares, sizes = 0, 0
    for t in range(len(first) - 1):
        x, y = (np.diff(clip[t : t + 2].astype(np.int32), axis=0) for clip in (first, second))
        squares += int(np.square(x - y).sum(dtype=np.int64))
        sizes += int(np.abs(x).sum(dtype=np.int64)) - int(np.abs(y).sum(dtype=np.int64))
    count = first[1:].size
    return _decibels(squares, count), sizes / count


def ssim(first: Clip, second: Clip) -> float:
    """Structural similarity, mean over frames and channels (Wang et al., 2004: 11x11 Gaussian window, sigma 1.5).

    Only windows that lie inside the frame count, so H and W must be at least 11.
    """
    return structure(first, second)[0]


def ms_ssim(first: Clip, second: Clip) -> float:
    """Multi-scale structural similarity, mean over frames and channels (Wang, Simoncelli and Bovik, 2003).

    Of each frame and channel: the product over the scales of the mean of contrast times structure, to the power of
    the scale's weight, on the coarsest with the luminance in it; a negative mean counts as 0. From scale to scale the
    means of 2x2 pixels (an odd last row or column is left out). Frames with less than 176 pixels on a side have fewer
    scales, as many as leave it 11, with the weights of those divided by their sum.
    """
    return structure(first, second)[1]


def scales_of(height: int, width: int) -> int:
    """How many scales of MS-SSIM a frame has."""
    fitting = [count for count in range(1, len(SCALE_WEIGHTS) + 1) if min(height, width) >> (count - 1) >= SSIM_WINDOW]
    if not fitting:
        raise ValueError(f"clips: {height}x{width} pixels; SSIM needs {SSIM_WINDOW}x{SSIM_WINDOW}")
    return fitting[-1]


def structure(first: Clip, second: Clip) -> tuple[float, float]:
    """`ssim` and `ms_ssim`, which share the work on the finest scale."""
    _check(first, second)
    weights = np.array(SCALE_WEIGHTS[: scales_of(*first.shape[1:3])])
    weights /= weights.sum()
    fine, coarse = 0.0, 0.0
    for chunk in _chunks(first, second):
        x, y = (clip.astype(np.float64) for clip in chunk)
        product: Floats = np.ones((len(x), x.shape[-1]))
        for scale, weight in enumerate(weights):
            if scale:
                x, y = _halved(x), _halved(y)
            similarity, contrast = _similarity(x, y)
            if scale == 0:
                fine += float(similarity.sum())
            factor = similarity if scale == len(weights) - 1 else contrast
            product *= np.maximum(factor, 0) ** weight
        coarse += float(product.sum())
    count = len(first) * first.shape[-1]
    return fine / count, coarse / count


def _similarity(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Means over the windows of x and y [T, H, W, C], each [T, C]: of the similarity, of contrast times structure."""
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    contrast = (2 * covariance + SSIM_C2) / (var_x + var_y + SSIM_C2)
    return (luminance * contrast).mean((1, 2)), contrast.mean((1, 2))


def _halved(images: Floats) -> Floats:
    """Means of 2x2 pixels of axes 1 and 2."""
    height, width = (size // 2 * 2 for size in images.shape[1:3])
    quarters = [images[:, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]
    return np.asarray(sum(quarters) / 4)


def _window_mean(images: Floats) -> Floats:
    """Gaussian-weighted mean of every whole window over axes 1 and 2."""
    taps = np.exp(-0.5 * ((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / SSIM_SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (1, 2):
        count = images.shape[axis] - SSIM_WINDOW + 1
        sliced = (images[(slice(None),) * axis + (slice(k, k + count),)] for k in range(SSIM_WINDOW))
        images = np.asarray(sum(tap * part for tap, part in zip(taps, sliced, strict=True)))
    return images


def load_lpips() -> tuple[Perceptual | None, str]:
    """LPIPS (Zhang et al., 2018; AlexNet), mean over frames, or None and what it needs. Downloads nothing."""
    found = probe("lpips")
    if found.version is None:
        return None, f"{found.reason}; {install_hint('lpips')}"
    import torch

    if not list(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth")):
        return None, "the weights of AlexNet are not in torch's cache; torchvision.models.alexnet downloads them"
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False)

    def tensor(clip: Clip) -> torch.Tensor:
        return torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.inference_mode()
    def distance(first: Clip, second: Clip) -> float:
        _check(first, second)
        return float(sum(float(network(tensor(x), tensor(y)).sum()) for x, y in _chunks(first, second)) / len(first))

    return distance, ""
