"""Distance between two clips, uint8 [T, H, W, 3]: PSNR and SSIM in float64, LPIPS where its weights are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightx2v.platform import install_hint, probe

Clip = NDArray[np.uint8]
Floats = NDArray[np.float64]

PEAK = 255.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def _check(first: Clip, second: Clip) -> None:
    if first.shape != second.shape or first.ndim != 4 or first.dtype != np.uint8 or second.dtype != np.uint8:
        shapes = f"{first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        raise ValueError(f"clips: got {shapes}; wanted two of uint8 [T, H, W, 3]")


def psnr(first: Clip, second: Clip) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames; infinite for equal clips."""
    _check(first, second)
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(first: Clip, second: Clip) -> float:
    """Structural similarity, mean over frames and channels (Wang et al., 2004: 11x11 Gaussian window, sigma 1.5).

    Only windows that lie inside the frame count, so H and W must be at least 11.
    """
    _check(first, second)
    if min(first.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"clips: {first.shape[1]}x{first.shape[2]} pixels; SSIM needs {SSIM_WINDOW}x{SSIM_WINDOW}")
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    contrast = (2 * covariance + SSIM_C2) / (var_x + var_y + SSIM_C2)
    return float(np.mean(luminance * contrast))


def _window_mean(images: Floats) -> Floats:
    """Gaussian-weighted mean of every whole window over axes 1 and 2."""
    taps = np.exp(-0.5 * ((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / SSIM_SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (1, 2):
        images = np.lib.stride_tricks.sliding_window_view(images, SSIM_WINDOW, axis) @ taps
    return images


def load_lpips() -> tuple[Callable[[Clip, Clip], float] | None, str]:
    """LPIPS (AlexNet), mean over frames, or None; and what it needs, if anything. Downloads nothing."""
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
        return float(network(tensor(first), tensor(second)).mean())

    return distance, ""
