"""Schedules and solvers against diffusers' own, to the bit, and against definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightx2v.errors import ConfigError
from lightx2v.sampling.schedule import (
    SOLVERS,
    ScheduleSpec,
    Solver,
    SolverName,
    check_step_list,
    first_step,
    initial_noise,
)

CPU = torch.device("cpu")
SHAPE = (2, 4, 2, 3, 5)
DEV = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""scheduler_config.json of FLUX.1 dev; that of schnell has another shift, and a fixed one."""
SCHNELL = {**DEV, "shift": 1.0, "use_dynamic_shifting": False}


def theirs(name: str, shift: float, **more: Any) -> Any:
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift, **more)
    kind = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **more)


def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
    """Something that is not straight, and tells one timestep from another."""
    return torch.sin(3 * latents) + 0.001 * timestep * latents.flip(-1)


def assert_same_way(solver: Solver, scheduler: Any, timesteps: Tensor, latents: Tensor) -> None:
    mine = latents
    for index, timestep in enumerate(timesteps):
        latents = scheduler.step(velocity(latents, timestep), timestep, latents, return_dict=False)[0]
        mine = solver.step(velocity(mine, solver.timesteps[index]), index, mine)
        assert torch.equal(mine, latents), f"step {index}"
    assert latents.isfinite().all()


def test_all_names_are_known() -> None:
    assert SOLVERS == get_args(SolverName)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 20, 50])
def test_solvers_are_those_of_diffusers(name: SolverName, shift: float, steps: int) -> None:
    scheduler, solver = theirs(name, shift), Solver(name, steps, shift)
    scheduler.set_timesteps(steps)
    assert torch.equal(torch.tensor(solver.sigmas), scheduler.sigmas)
    assert torch.equal(solver.timesteps, scheduler.timesteps) and solver.timesteps.dtype == scheduler.timesteps.dtype
    assert_same_way(solver, scheduler, scheduler.timesteps, initial_noise(SHAPE, 1, CPU))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("config", [DEV, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("tokens", [256, 1000, 4096, 16384])
def test_flux_schedules_are_those_of_its_pipeline(
    name: SolverName, config: dict[str, Any], steps: int, tokens: int
) -> None:
    dynamic, shift = bool(config["use_dynamic_shifting"]), float(config["shift"])
    scheduler = theirs(name, shift, use_dynamic_shifting=dynamic)
    # FluxPipeline.__call__: the scheduler's own spacing where it has one
    sigmas = None if name != "euler" else np.linspace(1.0, 1 / steps, steps)
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15) if dynamic or name == "euler" else None
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    solver = Solver(name, steps, None, spec=ScheduleSpec.from_config(config), tokens=tokens)
    assert torch.equal(torch.tensor(solver.sigmas), scheduler.sigmas)
    assert torch.equal(solver.timesteps, timesteps)
    assert solver.shift == pytest.approx(float(np.exp(mu)) if dynamic else shift)
    scheduler.set_begin_index(0)
    assert_same_way(solver, scheduler, timesteps, initial_noise(SHAPE, 2, CPU))


def test_a_shift_of_the_request_replaces_the_dynamic_one() -> None:
    solver = Solver("euler", 4, 3.0, spec=ScheduleSpec.from_config(DEV), tokens=4096)
    even = torch.linspace(1, 0.25, 4, dtype=torch.float64)
    assert torch.allclose(torch.tensor(solver.sigmas[:-1]).double(), 3 * even / (1 + 2 * even), atol=1e-6)
    with pytest.raises(ValueError, match="number of tokens"):
        Solver("euler", 4, None, spec=ScheduleSpec.from_config(DEV))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("steps", "strength"), [(28, 0.6), (28, 1.0), (10, 0.95), (4, 0.25), (1, 1.0), (7, 0.15)])
def test_image_to_image_starts_as_in_flux(name: SolverName, steps: int, strength: float) -> None:
    scheduler = theirs(name, 3.0)
    scheduler.set_timesteps(steps)
    pipeline = FluxImg2ImgPipeline(scheduler, None, None, None, None, None, None)
    timesteps, left = pipeline.get_timesteps(steps, strength, "cpu")
    spec = ScheduleSpec(shift=3.0)
    solver = Solver(name, steps, None, spec=spec, start=first_step(steps, strength))
    assert solver.steps == left and torch.equal(solver.timesteps, timesteps)
    assert torch.equal(torch.tensor(solver.sigmas), scheduler.sigmas[steps - left :])
    image, noise = initial_noise(SHAPE, 3, CPU), initial_noise(SHAPE, 4, CPU)
    add: Callable[..., Tensor] = getattr(scheduler, "scale_noise", None) or (
        lambda x, t, e: scheduler.add_noise(x, e, t)
    )
    noised = add(image, timesteps[:1].repeat(2), noise)
    start = solver.start(SHAPE, lambda shape: noise, image)
    assert torch.equal(start, noised)
    assert torch.equal(solver.start(SHAPE, lambda shape: noise), noise)
    assert_same_way(solver, scheduler, timesteps, start)


def test_a_strength_that_leaves_nothing() -> None:
    assert first_step(4, 0.2) == 3 and first_step(10, 0.05) == 9
    with pytest.raises(ConfigError, match="leaves none"):
        first_step(10, 0.0)


@pytest.mark.parametrize("step_list", [[1000, 750, 500, 250], [1000], [1000, 960, 889, 727], [999, 1]])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_step_list_is_followed(step_list: list[int], shift: float) -> None:
    solver = Solver("euler", len(step_list), shift, step_list=step_list)
    base = np.array(step_list, dtype=np.float64) / 1000
    sigmas = shift * base / (1 + (shift - 1) * base)
    assert np.allclose(solver.sigmas, [*sigmas, 0], atol=1e-6)
    assert np.allclose(solver.timesteps.numpy(), 1000 * sigmas, atol=1e-3)
    latents = initial_noise(SHAPE, 5, CPU)
    expected = latents.double()
    for index, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        v = velocity(latents, solver.timesteps[index])
        clean = latents.double() - sigma * v.double()  # x0, and from there to the next noise level along v
        expected = clean + following * v.double()
        latents = solver.step(v, index, latents)
        assert (latents - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("step_list", "steps", "solver", "key"),
    [
        ([1000, 500], 4, None, "sampling.steps"),
        ([1000, 500], 2, "unipc", "sampling.solver"),
        ([500, 1000], None, None, "does not fall"),
        ([500, 500], None, None, "does not fall"),
        ([1001], None, None, "1 to 1000"),
        ([10, 0], None, None, "1 to 1000"),
        ([], None, None, "1 to 1000"),
    ],
)
def test_step_lists_that_disagree(step_list: list[int], steps: int | None, solver: str | None, key: str) -> None:
    check_step_list([1000, 500], 2, "euler")
    with pytest.raises(ConfigError, match=key):
        check_step_list(step_list, steps, solver)


class Waits(TorchDispatchMode):
    """Collects what would make the host wait for a device: reads of a value, copies to or from it, and solving."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(result if isinstance(result, tuple) else (result,))) if isinstance(t, Tensor)]
        names = ("_local_scalar_dense", "_to_copy", "copy_", "linalg")
        if any(name in str(func) for name in names) and any(t.is_meta for t in tensors):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("name", SOLVERS)
def test_no_step_waits_for_the_device(name: SolverName) -> None:
    solver, latents = Solver(name, 6, 3.0, torch.device("meta")), torch.empty(SHAPE, device="meta")
    with Waits() as waits:
        for step in range(solver.steps):
            timestep = solver.timesteps[step].expand(2)
            assert timestep.is_meta
            latents = solver.step(torch.empty(SHAPE, device="meta"), step, latents)
    assert waits.found == []


def test_the_scheduler_of_diffusers_does_wait() -> None:
    """Which is why UniPC is written out, and shows that the test above sees it."""
    scheduler = theirs("unipc", 3.0)
    scheduler.set_timesteps(4, device="meta")
    scheduler.set_begin_index(0)
    latents = torch.empty(SHAPE, device="meta")
    with Waits() as waits:
        for timestep in scheduler.timesteps:
            latents = scheduler.step(latents, timestep, latents, return_dict=False)[0]
    assert any("linalg" in name for name in waits.found) and any("_to_copy" in name for name in waits.found)
