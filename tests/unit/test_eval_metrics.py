"""Each distance between clips against its definition, written out another way."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.eval import metrics
from lightx2v.eval.metrics import SCALE_WEIGHTS, load_lpips, measure, ms_ssim, psnr, scales_of, ssim, temporal
from lightx2v.platform import Probe


def clips(frames: int, height: int, width: int, noise: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth random clip, and the same with noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, height // 8 + 2, width // 8 + 2, 3)).repeat(8, 1).repeat(8, 2)
    first = coarse[:, :height, :width]
    second = (first + rng.integers(-noise, noise + 1, first.shape)).clip(0, 255)
    return first.astype(np.uint8), second.astype(np.uint8)


def by_torch(first: np.ndarray, second: np.ndarray, scales: int) -> float:
    """MS-SSIM by convolutions with the whole window and average pooling, one frame and channel at a time."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window = (window / window.sum())[None, None]
    weights = torch.tensor(SCALE_WEIGHTS[:scales], dtype=torch.float64)
    weights = weights / weights.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window)

    values = []
    for a, b in zip(first, second, strict=True):
        for channel in range(3):
            x, y = (torch.from_numpy(frame[..., channel].astype(np.float64))[None, None] for frame in (a, b))
            product = 1.0
            for scale in range(scales):
                mx, my = blur(x), blur(y)
                vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
                contrast = (2 * cov + 58.5225) / (vx + vy + 58.5225)
                luminance = (2 * mx * my + 6.5025) / (mx * mx + my * my + 6.5025)
                value = (contrast * luminance if scale == scales - 1 else contrast).mean()
                product = product * float(value.clamp(min=0)) ** float(weights[scale])
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            values.append(product)
    return float(np.mean(values))


def test_psnr_of_a_known_error() -> None:
    clip = np.full((2, 16, 16, 3), 100, np.uint8)
    assert psnr(clip, clip) == math.inf
    assert psnr(clip, clip + np.uint8(5)) == pytest.approx(10 * math.log10(255**2 / 25))


def test_ssim_agrees_with_its_definition() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 1, 11, 11, 1)).astype(np.uint8).repeat(3, axis=-1)
    assert ssim(first, first) == pytest.approx(1)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = first[0, :, :, 0].astype(float), second[0, :, :, 0].astype(float)
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    cov = (window * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(first, second) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_clips_of_different_sizes_are_refused(metric: object) -> None:
    with pytest.raises(ValueError, match="wanted two of uint8"):
        metric(np.zeros((1, 16, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.uint8))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("height", "width", "scales"), [(181, 197, 5), (88, 120, 4), (64, 64, 3), (47, 25, 2), (16, 21, 1)]
)
def test_ms_ssim_agrees_with_its_definition(height: int, width: int, scales: int) -> None:
    first, second = clips(2, height, width)
    assert scales_of(height, width) == scales
    assert ms_ssim(first, second) == pytest.approx(by_torch(first, second, scales), abs=1e-12)
    assert ms_ssim(first, first) == pytest.approx(1)


def test_ms_ssim_of_one_scale_is_ssim() -> None:
    first, second = clips(2, 16, 21)
    assert ms_ssim(first, second) == pytest.approx(ssim(first, second), abs=1e-3)


def test_ms_ssim_of_opposite_pictures_is_a_number() -> None:
    first, _ = clips(1, 64, 64)
    assert ms_ssim(first, 255 - first) == 0
    assert ssim(first, 255 - first) < 0


def test_the_weights_are_those_that_were_published() -> None:
    assert sum(SCALE_WEIGHTS) == pytest.approx(1, abs=1e-3)
    assert SCALE_WEIGHTS[2] == max(SCALE_WEIGHTS)


def test_temporal_consistency_is_about_changes_alone() -> None:
    first, second = clips(5, 24, 24)
    brighter = (first // 2 + 40).astype(np.uint8)
    assert temporal(brighter, (brighter + 7).astype(np.uint8)) == (math.inf, 0)
    x, y = (np.diff(clip.astype(np.float64), axis=0) for clip in (second, first))
    found = temporal(second, first)
    assert found is not None
    assert found[0] == pytest.approx(10 * math.log10(255**2 / np.mean((x - y) ** 2)))
    assert found[1] == pytest.approx(np.abs(x).mean() - np.abs(y).mean())
    assert temporal(first[:1], second[:1]) is None


def test_a_clip_that_flickers_has_a_positive_flicker() -> None:
    still = np.full((6, 16, 16, 3), 100, np.uint8)
    flickering = still.copy()
    flickering[::2] += 10
    found = temporal(flickering, still)
    assert found == (pytest.approx(10 * math.log10(255**2 / 100)), 10)
    assert temporal(still, flickering) == (found[0], -10)


def test_distances_do_not_depend_on_how_many_frames_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = clips(7, 30, 41)
    together = measure(*pair)
    monkeypatch.setattr(metrics, "CHUNK", 2 * 30 * 41 * 3)
    apart = measure(*pair)
    assert apart.psnr == together.psnr and apart.temporal_psnr == together.temporal_psnr
    assert (apart.ssim, apart.ms_ssim) == (pytest.approx(together.ssim), pytest.approx(together.ms_ssim))


def test_pictures_below_the_window_are_refused() -> None:
    small = np.zeros((1, 10, 30, 3), np.uint8)
    with pytest.raises(ValueError, match="10x30 pixels; SSIM needs 11x11"):
        ms_ssim(small, small)


def test_lpips_is_the_mean_over_the_frames(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Network:
        def __init__(self, net: str, verbose: bool) -> None:
            assert (net, verbose) == ("alex", False)

        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            assert x.shape[1:] == (3, 16, 16) and float(x.min()) >= -1 and float(x.max()) <= 1
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    fake = types.ModuleType("lpips")
    monkeypatch.setattr(fake, "LPIPS", Network, raising=False)
    monkeypatch.setitem(sys.modules, "lpips", fake)
    monkeypatch.setattr(metrics, "probe", lambda module: Probe(module, "1.0", None))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network, reason = load_lpips()
    assert network is None and "AlexNet" in reason
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt.pth").touch()
    network, reason = load_lpips()
    assert network is not None and not reason
    first, second = clips(5, 16, 16)
    monkeypatch.setattr(metrics, "CHUNK", 2 * 16 * 16 * 3)
    expected = np.abs(first.astype(float) - second).mean() / 127.5
    assert measure(first, second, network).lpips == pytest.approx(expected)
