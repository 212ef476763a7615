"""Training with quantized weights: a small Wan learns back what few bits lost, from the unquantized one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from lightx2v.integrations.quanto import QuantizedLinear, freeze, learn_ranges, quantize
from lightx2v.models.base import Conditions
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from tools.qat.distill import LATE, LATE_WEIGHT, SETTLING, Pace, batches, distill, loss_of, rated
from tools.qat.start import solve_blocks
from tools.qat.states import Made, States, make

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


GUIDANCE = 1.5


@torch.no_grad()
def states_of(count: int, seed: int) -> States:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, 2, 4, 4, generator=generator)
    timesteps = 1000 * torch.rand(count, generator=generator)
    texts = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(5))
    return States(latents, timesteps, texts, torch.randint(4, (count,), generator=generator), GUIDANCE)


@torch.no_grad()
def psnr(student: WanDiT, model: WanDiT, held_out: States) -> float:
    """dB of the velocities, against their range."""
    wanted = make(model, held_out).velocities
    error = (make(student, held_out).velocities - wanted).square().mean()
    return 10 * math.log10(float(wanted.amax() - wanted.amin()) ** 2 / float(error))


def quantized(model: WanDiT, weights: str) -> WanDiT:
    student = copy.deepcopy(model)
    quantize(student, weights=weights, include="blocks.*")
    return student


@pytest.mark.parametrize(("weights", "solved", "trained"), [("qint4", 1.0, 0.5), ("qint2", 1.0, 1.0)])
def test_solving_and_a_few_steps_bring_quality_back(weights: str, solved: float, trained: float) -> None:
    model = teacher()
    untrained, student = quantized(model, weights), quantized(model, weights)
    held_out, states = states_of(64, seed=2), states_of(256, seed=1)
    solve_blocks(student, model, states.at(torch.arange(128)))
    assert all(parameter.requires_grad for parameter in (*student.parameters(), *model.parameters()))
    start, better = psnr(untrained, model, held_out), psnr(student, model, held_out)
    assert better > start + solved
    losses = distill(student, model, states, Pace(steps=60, batch=32, weights=0.1, ranges=2e-3, others=1e-3))
    for each in (untrained, student):
        freeze(each)
        assert isinstance(each.blocks[0].ffn[0], QuantizedLinear)  # type: ignore[index]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert psnr(student, model, held_out) > better + trained


def test_settling_moves_no_code_and_brings_quality_back() -> None:
    model = teacher()
    student = quantized(model, "qint4")
    held_out, states = states_of(64, seed=2), states_of(256, seed=1)
    solve_blocks(student, model, states.at(torch.arange(128)))
    settled = copy.deepcopy(student)
    distill(settled, model, states, replace(SETTLING, steps=60, others=1e-4))
    assert psnr(settled, model, held_out) > psnr(student, model, held_out) + 0.2
    for each in (student, settled):
        freeze(each)
    before, after = student.state_dict(), settled.state_dict()
    coded = [name for name in before if name.endswith(("._data", "._scale", "._shift"))]
    assert coded and all(torch.equal(before[name], after[name]) for name in coded)
    assert not torch.equal(before["blocks.0.ffn.0.bias"], after["blocks.0.ffn.0.bias"])


@torch.no_grad()
def test_both_branches_are_made_in_one_pass() -> None:
    model = teacher()
    states = states_of(3, seed=6)
    none = states.texts[-1:].expand(3, -1, -1)
    cond = model(states.latents, states.timesteps, Conditions(text=states.texts[states.said]))
    uncond = model(states.latents, states.timesteps, Conditions(text=none))
    made = make(model, states)
    torch.testing.assert_close(made.velocities, GUIDANCE * cond - (GUIDANCE - 1) * uncond, rtol=1e-4, atol=1e-5)
    assert [stream.shape[0] for stream in made.streams] == [6] * len(model.blocks)
    some = make(model, states.at(torch.tensor([2, 0])))
    torch.testing.assert_close(some.velocities, made.velocities[[2, 0]], rtol=1e-4, atol=1e-5)


def test_late_velocities_count_more_and_the_last_stream_does_not() -> None:
    times = torch.tensor([LATE + 1, LATE - 1])
    zero, streams = torch.zeros(2, 1, 1, 2, 2), [torch.ones(4, 3, 2), torch.ones(4, 3, 2)]
    off = zero.clone()
    off[0], off[1] = 2.0, 3.0
    wanted = (4 + LATE_WEIGHT * 9) / 2
    assert float(loss_of(Made(off, streams), Made(zero, streams), times, 5.0)) == pytest.approx(wanted)
    first, last = [1.5 * streams[0], streams[1]], [streams[0], 7 * streams[1]]
    assert float(loss_of(Made(zero, first), Made(zero, streams), times, 5.0)) == pytest.approx(5 * 0.25)
    assert float(loss_of(Made(zero, last), Made(zero, streams), times, 5.0)) == 0


def test_rates_are_in_grid_steps_of_each_layer() -> None:
    student = quantized(teacher(), "qint4")
    learn_ranges(student)
    groups = rated(student, Pace(weights=0.5, ranges=0.01, others=1e-4))
    layer = student.blocks[1].ffn[2]  # type: ignore[index]
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rates.keys() == {id(parameter) for parameter in student.parameters()}
    step = float(layer.weight_scale.detach().mean())
    assert rates[id(layer.weight)] == pytest.approx(0.5 * step)
    assert rates[id(layer.weight_scale)] == pytest.approx(0.01 * step)
    assert rates[id(layer.weight_low)] == pytest.approx(0.01 * step * 7.5)
    assert rates[id(layer.bias)] == rates[id(student.head.head.weight)] == 1e-4


def test_no_state_comes_twice_before_all_came() -> None:
    drawn = batches(10, 4, seed=0)
    for _ in range(3):
        rows = torch.cat([next(drawn), next(drawn)])
        assert len(set(rows.tolist())) == 8 and int(rows.max()) < 10
