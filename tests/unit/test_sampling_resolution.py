"""Changing resolution: its stages, their shapes and schedules, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v.errors import ConfigError
from lightx2v.sampling.loop import denoise
from lightx2v.sampling.resolution import ChangingResolution, Stage, plan_stages
from lightx2v.sampling.schedule import ScheduleSpec, Solver, noise_source

SHAPE = (1, 4, 3, 16, 24)
PATCH = (1, 2, 2)
DYNAMIC = ScheduleSpec(kind="dynamic", spacing="even")


def test_lists_and_single_values_make_stages() -> None:
    assert plan_stages(20) == (Stage(0, 10, 0.75), Stage(10, 20, 1.0)), "LightX2V's defaults"
    assert plan_stages(20, 0.5, 4) == plan_stages(20, [0.5], [4])
    assert plan_stages(50, (1.0, 0.75), (10, 35)) == (Stage(0, 10, 1.0), Stage(10, 35, 0.75), Stage(35, 50, 1.0))


@pytest.mark.parametrize(
    ("rates", "changes", "key"),
    [
        ([0.5, 0.75], [4], "one for each"),
        ([0.0], [4], "resolution_rate"),
        ([1.5], [4], "resolution_rate"),
        ([0.5], [0], "1 to 9"),
        ([0.5], [10], "1 to 9"),
        ([0.5, 0.75], [4, 4], "rising"),
        ([0.5, 0.75], [6, 4], "rising"),
        ([], [], "changing_resolution_steps"),
    ],
)
def test_stages_that_cannot_be(rates: list[float], changes: list[int], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        plan_stages(10, rates, changes)
    with pytest.raises(ConfigError, match="1 to 0"):
        plan_stages(1)


def test_every_stage_has_its_size_and_its_schedule() -> None:
    stages = plan_stages(10, [0.5, 0.8], [3, 6])
    sampler = ChangingResolution("unipc", 10, 3.0, stages=stages, shape=SHAPE, patch=PATCH)
    assert sampler.restarts == (3, 6) and sampler.steps == 10
    solvers = [Solver("unipc", 10, shift) for shift in (3.0, 4.0, 5.0)]
    owner = [0] * 3 + [1] * 3 + [2] * 4
    assert sampler.sigmas == (*(solvers[number].sigmas[step] for step, number in enumerate(owner)), 0.0)
    assert sampler.timesteps.tolist() == [solvers[number].timesteps[step].item() for step, number in enumerate(owner)]
    sizes: list[tuple[int, ...]] = []

    def velocity(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        sizes.append(tuple(latents.shape[-2:]))
        return torch.zeros_like(latents)

    result = denoise(sampler.start(SHAPE, noise_source(1)), sampler, velocity)
    assert sizes == [(8, 12)] * 3 + [(12, 18)] * 3 + [(16, 24)] * 4, "rounded down to whole patches"
    assert result.shape == SHAPE


@pytest.mark.parametrize("name", ["unipc", "euler", "dpm++"])
@pytest.mark.parametrize("spec", [ScheduleSpec(shift=3.0), DYNAMIC], ids=["static", "dynamic"])
def test_a_flow_that_knows_its_data_ends_there(name: str, spec: ScheduleSpec) -> None:
    """Every stage sees its data at the noise level that it is told: a wrong one would not end at the data."""
    stages = plan_stages(9, [1.0, 0.5], [3, 6])
    sampler = ChangingResolution(name, 9, None, stages=stages, shape=SHAPE, patch=PATCH, spec=spec)  # type: ignore[arg-type]
    data = 0.25

    def velocity(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        noise = (latents - (1 - sampler.sigmas[step]) * data) / sampler.sigmas[step]
        assert abs(noise.std().item() - 1) < 0.15 and abs(noise.mean().item()) < 0.15
        return noise - data

    result = denoise(sampler.start(SHAPE, noise_source(2)), sampler, velocity)
    assert torch.allclose(result, torch.full(SHAPE, data), atol=1e-4)


def test_a_dynamic_shift_follows_the_size() -> None:
    sampler = ChangingResolution("euler", 4, None, stages=plan_stages(4), shape=SHAPE, patch=PATCH, spec=DYNAMIC)
    small, full = (Solver("euler", 4, None, spec=DYNAMIC, tokens=tokens) for tokens in (3 * 6 * 9, 3 * 8 * 12))
    assert sampler.sigmas == (*small.sigmas[:2], *full.sigmas[2:])


def test_what_changing_resolution_does_not_do() -> None:
    sampler = ChangingResolution("euler", 4, 3.0, stages=plan_stages(4), shape=SHAPE, patch=PATCH)
    with pytest.raises(ConfigError, match="does not start from an image"):
        sampler.start(SHAPE, noise_source(0), torch.zeros(SHAPE))
    with pytest.raises(ConfigError, match="leaves nothing of 16x24"):
        ChangingResolution("euler", 4, 3.0, stages=plan_stages(4, 0.1, 2), shape=SHAPE, patch=PATCH)
