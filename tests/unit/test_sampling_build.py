"""The settings of a request make one sampler, or an error that names them."""

from __future__ import annotations

from typing import Any

import pytest

from lightx2v.config.schema import SamplingConfig
from lightx2v.errors import ConfigError
from lightx2v.sampling.build import build_sampler
from lightx2v.sampling.loop import Sampler
from lightx2v.sampling.resolution import ChangingResolution
from lightx2v.sampling.schedule import ScheduleSpec, Solver

SHAPE, PATCH = (1, 16, 1, 16, 24), (1, 2, 2)
FLUX = ScheduleSpec(kind="dynamic", shift=3.0, spacing="even")


def build(task: str = "t2i", spec: ScheduleSpec = FLUX, shift: float | None = None, **settings: Any) -> Sampler:
    config = SamplingConfig(**settings)
    steps, solver = config.steps or 8, config.solver or "euler"
    return build_sampler(
        config, task=task, solver=solver, steps=steps, shift=shift, shape=SHAPE, patch=PATCH, spec=spec
    )


def test_tokens_give_the_shift() -> None:
    assert build().sigmas == Solver("euler", 8, None, spec=FLUX, tokens=96).sigmas
    assert build(shift=2.0).sigmas == Solver("euler", 8, 2.0, spec=FLUX).sigmas


def test_strength_leaves_steps_out() -> None:
    assert build("i2i", strength=0.5).sigmas == build().sigmas[4:]
    assert build("i2i").sigmas == build().sigmas, "no strength: from noise"


def test_a_step_list_is_passed_on() -> None:
    sampler = build("t2v", shift=5.0, denoising_step_list=[1000, 500], steps=2)
    assert sampler.sigmas == pytest.approx((1.0, 5 * 0.5 / 3, 0.0))


def test_changing_resolution_is_built() -> None:
    sampler = build("t2v", shift=3.0, changing_resolution=True, resolution_rate=0.5, changing_resolution_steps=3)
    assert isinstance(sampler, ChangingResolution) and sampler.restarts == (3,)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("t2v", {"strength": 0.5}, "sampling.strength"),
        ("i2i", {"strength": 0.0}, "leaves none"),
        ("i2v", {"changing_resolution": True}, "task i2v"),
        ("i2i", {"changing_resolution": True}, "task i2i"),
        ("t2v", {"changing_resolution": True, "denoising_step_list": [1000, 500], "steps": 2}, "denoising_step_list"),
        ("t2v", {"changing_resolution": True, "changing_resolution_steps": 8}, "1 to 7"),
        ("t2v", {"denoising_step_list": [1000, 500]}, "8 steps"),
        ("t2v", {"denoising_step_list": [1000, 500], "steps": 2, "solver": "dpm++"}, "dpm"),
    ],
)
def test_settings_that_do_not_go_together(task: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(task, shift=3.0, **settings)
