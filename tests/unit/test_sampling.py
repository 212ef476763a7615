"""Noise schedules, solvers and guidance, on flows whose solution is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError
from lightx2v.models.base import Branch
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.request import build_request
from lightx2v.sampling.loop import Progress, cfg_scales, denoise, forwards, guided
from lightx2v.sampling.schedule import Solver, initial_noise, noise_source

DEFAULTS = {
    "steps": 4,
    "shift": 3.0,
    "guidance": 2.0,
    "solver": "unipc",
    "strength": None,
    "step_list": None,
    "height": 64,
    "width": 64,
    "frames": 5,
    "fps": 8,
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_the_schedule_is_known_before_the_loop(name: str, shift: float) -> None:
    solver = Solver(name, 10, shift)  # type: ignore[arg-type]
    sigmas = torch.tensor(solver.sigmas)
    assert len(sigmas) == 11 and sigmas[-1] == 0 and abs(sigmas[0] - 1) < 1e-5
    assert (sigmas.diff() < 0).all()
    assert (solver.timesteps.double() - sigmas[:-1] * 1000).abs().max() <= 1, "told of the noise level, in thousandths"


def test_a_shift_spends_more_steps_on_high_noise() -> None:
    plain, shifted = (torch.tensor(Solver("unipc", 10, shift).sigmas[1:-1]) for shift in (1.0, 3.0))
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=1e-6)


@pytest.mark.parametrize(("name", "error"), [("unipc", 1e-4), ("euler", 1e-4), ("dpm++", 4e-3)])
def test_a_straight_flow_ends_at_the_data(name: str, error: float) -> None:
    """DPM++ begins at a noise level of 0.999 or so, and takes the noise for that."""
    data, noise = torch.full((1, 2, 3), 0.25), initial_noise((1, 2, 3), 5, CPU)
    seen: list[Progress] = []
    solver = Solver(name, 6, 3.0)  # type: ignore[arg-type]
    result = denoise(noise, solver, lambda latents, timestep, step: noise - data, seen.append)
    assert torch.allclose(result, data, atol=error)
    assert [progress.step for progress in seen] == [1, 2, 3, 4, 5, 6]


def test_guidance_weighs_the_branches() -> None:
    calls: list[tuple[int, Branch]] = []

    def predict(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
        calls.append((step, branch))
        return torch.tensor(3.0 if branch == "cond" else 1.0)

    nothing = torch.zeros(1)
    assert guided(predict, 2.5)(nothing, nothing, 0) == 1 + 2.5 * (3 - 1)
    assert guided(predict, 1.0)(nothing, nothing, 0) == 3
    calls.clear()
    scales = (2.0, 1.0, 4.0)
    assert [guided(predict, scales)(nothing, nothing, step).item() for step in range(3)] == [5, 3, 9]
    assert calls == list(forwards(scales)), "the forwards are known before the loop"
    assert calls == [(0, "cond"), (0, "uncond"), (1, "cond"), (2, "cond"), (2, "uncond")]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(None, [0, 1, 2, 3]), (":2", [0, 1]), ("1:3", [1, 2]), ("3:", [3]), ("-1:", [3]), (":9", [0, 1, 2, 3])],
)
def test_guidance_has_a_schedule(schedule: str | None, steps: list[int]) -> None:
    assert cfg_scales(4, 6.0, schedule) == tuple(6.0 if step in steps else 1.0 for step in range(4))


@pytest.mark.parametrize("schedule", ["", "2", "a:b", "1:2:3", "2:2", "4:", "0.5:1"])
def test_guidance_schedules_that_are_none(schedule: str) -> None:
    with pytest.raises(ConfigError, match="cfg_schedule"):
        cfg_scales(4, 6.0, schedule)


def test_a_seed_is_a_start() -> None:
    assert torch.equal(initial_noise((4,), 1, CPU), initial_noise((4,), 1, CPU))
    assert not torch.equal(initial_noise((4,), 1, CPU), initial_noise((4,), 2, CPU))
    draw = noise_source(1)
    assert torch.equal(draw((4,)), initial_noise((4,), 1, CPU))
    assert not torch.equal(draw((4,)), initial_noise((4,), 1, CPU)), "a second draw goes on"


@pytest.mark.parametrize(("steps", "shift", "key"), [(0, 1.0, "sampling.steps"), (4, 0.0, "sampling.shift")])
def test_schedules_that_are_none(steps: int, shift: float, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Solver("unipc", steps, shift)


@pytest.mark.parametrize(
    ("settings", "cfg"),
    [({}, True), ({"sampling.guidance": 1.0}, False), ({"sampling.cfg": False}, False), ({"sampling.cfg": True}, True)],
)
def test_when_the_unconditional_branch_runs(settings: dict[str, object], cfg: bool) -> None:
    request = build_request(load_config(None, settings), DEFAULTS)
    assert request.cfg is cfg and request.to_json()["cfg"] is cfg


def test_a_request_may_raise_the_guidance_of_a_pipeline_without_it(tmp_path: Path) -> None:
    pipe = LightX2VPipeline(device="cpu").create_generator(guidance_scale=1.0, infer_steps=2)
    assert not pipe.plan.request.cfg
    prompt = "a red circle on a white background moves right"
    plain, strong = (pipe.generate(prompt, guidance=guidance, quiet=True) for guidance in (1.0, 4.0))
    assert (plain != strong).any()
