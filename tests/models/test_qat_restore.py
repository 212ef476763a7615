"""Restored scenes: a known error gives a known PSNR, and tiny-wan loses by rounding what it is said to lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightx2v.integrations.quanto import freeze
from tools.qat.__main__ import quantized
from tools.qat.restore import LEVELS, Noised, noised, restored_psnr
from tools.qat.studio import Studio


class Knowing(torch.nn.Module):
    """Knows the answer, and is off by `error` in it."""

    def __init__(self, clips: Noised, error: float) -> None:
        super().__init__()
        self.clips, self.error = clips, error

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        level = timesteps[0] / 1000
        assert torch.allclose(noisy, (1 - level) * self.clips.clean + level * self.clips.noise, atol=1e-6)
        return self.clips.noise - self.clips.clean + self.error / level


@pytest.mark.parametrize(("error", "wanted"), [(0.1, 20.0), (0.01, 40.0)])
def test_a_known_error_has_a_known_psnr(error: float, wanted: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 2, 4, 4, generator=generator) for _ in range(2))
    clips = Noised(clean, noise, torch.zeros(3, 8, 16), torch.linspace(0.1, 0.9, LEVELS))
    model: Any = Knowing(clips, error)
    assert restored_psnr(model, clips) == pytest.approx(wanted, abs=0.01)


def test_fewer_bits_restore_less() -> None:
    studio = Studio()
    scenes = noised(studio, 4)
    assert scenes.clean.mean().abs() < 0.3 and 0.7 < scenes.clean.std() < 1.3, "latents are normalized"
    assert scenes.texts.shape[0] == 4
    found = [restored_psnr(studio.model(), scenes)]
    for weights in ("qint4", "qint2"):
        model = quantized(studio, weights)
        freeze(model)
        found.append(restored_psnr(model, scenes))
    assert found[0] - 1.5 < found[1] < found[0] - 0.1
    assert found[2] < found[1] - 2
