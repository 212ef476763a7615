"""Training with quantized weights: a small Wan learns back what two bits lost, from the unquantized one."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from lightx2v.integrations.quanto import QuantizedLinear, freeze, quantize
from lightx2v.models.base import Conditions
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from tools.qat.distill import Pace, States, distill

ARCH = {
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 256,
    "freq_dim": 32,
    "in_dim": 4,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 2,
    "text_dim": 16,
    "text_len": 8,
}


def teacher() -> WanDiT:
    torch.manual_seed(0)
    return WanDiT(WanArch.from_config(ARCH)).eval()


@torch.no_grad()
def states(model: WanDiT, count: int, seed: int) -> States:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, 2, 4, 4, generator=generator)
    timesteps = 1000 * torch.rand(count, generator=generator)
    texts = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(5))
    said = torch.randint(4, (count,), generator=generator)
    return States(latents, timesteps, texts, said, model(latents, timesteps, Conditions(text=texts[said])))


@torch.no_grad()
def psnr(model: WanDiT, held_out: States) -> float:
    """dB of the velocities, against their range."""
    text = Conditions(text=held_out.texts[held_out.said])
    got: Tensor = model(held_out.latents, held_out.timesteps, text)
    error = (got - held_out.velocities).square().mean()
    return 10 * math.log10(float(held_out.velocities.aminmax().max - held_out.velocities.amin()) ** 2 / float(error))


def test_a_few_steps_bring_quality_back() -> None:
    model = teacher()
    student = copy.deepcopy(model)
    quantize(student, weights="qint2", include="blocks.*")
    untrained, held_out = copy.deepcopy(student), states(model, 64, seed=2)
    losses = distill(student, states(model, 256, seed=1), Pace(steps=60, batch=32, lr=2e-3))
    for each in (untrained, student):
        freeze(each)
        assert isinstance(each.blocks[0].ffn[0], QuantizedLinear)  # type: ignore[index]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert psnr(student, held_out) > psnr(untrained, held_out) + 3
