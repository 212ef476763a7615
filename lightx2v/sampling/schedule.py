"""Solvers of the flow ODE, with their noise schedule known before the loop starts.

A flow-matching model predicts the velocity v = noise - data at x = (1 - sigma) * data + sigma * noise. Wan shifts the
schedule towards the noisy end, sigma' = s * sigma / (1 + (s - 1) * sigma) (Esser et al. 2024, eq. 23).
The solvers themselves are diffusers' schedulers: UniPC (Zhao et al. 2023; bh2, order 2) and Euler.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightx2v.errors import ConfigError

SolverName = Literal["unipc", "euler"]


def _scheduler(name: SolverName, shift: float) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    raise ConfigError("sampling.solver", f"unknown solver '{name}'", allowed="unipc, euler")


class Solver:
    """One request's way from noise to data; holds the history of a multistep method, so make one for each request."""

    def __init__(self, name: SolverName, steps: int, shift: float, device: torch.device | None = None) -> None:
        if steps < 1:
            raise ConfigError("sampling.steps", f"{steps} is not a number of steps", allowed="1 or more")
        if shift <= 0:
            raise ConfigError("sampling.shift", f"{shift} is not a shift", allowed="more than 0")
        self.name, self.steps, self.shift = name, steps, shift
        self._scheduler = _scheduler(name, shift)
        self._scheduler.set_timesteps(steps, device=device)
        # Without this the scheduler would search its table for each timestep, which reads from the device.
        self._scheduler.set_begin_index(0)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of every step and the final 0, `steps + 1` numbers."""
        return tuple(float(s) for s in self._scheduler.sigmas)

    @property
    def timesteps(self) -> Tensor:
        """[steps], what the model is told of the noise level, between 0 and 1000."""
        timesteps: Tensor = self._scheduler.timesteps
        return timesteps

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """Latents after step `index`, from the predicted `velocity`; float32, shape unchanged."""
        latents = self._scheduler.step(velocity.float(), self._scheduler.timesteps[index], latents, return_dict=False)[
            0
        ]
        return latents.float()


def initial_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal noise in float32, drawn on the CPU so that a seed gives the same start on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)
