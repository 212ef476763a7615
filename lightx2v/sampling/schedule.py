"""Noise schedules and solvers of the flow ODE, known before the loop starts.

A flow-matching model predicts the velocity v = noise - data at x = (1 - sigma) * data + sigma * noise. The noise levels
are shifted towards the noisy end, sigma' = s * sigma / (1 + (s - 1) * sigma) (Esser et al. 2024, eq. 23), by a shift s
that is fixed (Wan) or grows with the number of tokens (FLUX). The solvers are diffusers' schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightx2v.errors import ConfigError

SolverName = Literal["unipc", "euler", "dpm++"]
SOLVERS = ("unipc", "euler", "dpm++")
TRAIN_STEPS = 1000
"""Noise levels that the models were trained on: a timestep is a noise level in thousandths."""

Draw = Callable[[tuple[int, ...]], Tensor]
"""A shape to fresh standard normal noise."""


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """How a model's noise levels are spaced where the request gives no shift: its scheduler_config.json."""

    kind: Literal["static", "dynamic"] = "static"
    """Whether the shift is `shift`, or exp(mu) with a mu that is linear in the number of tokens."""
    shift: float = 1.0
    spacing: Literal["table", "even"] = "table"
    """Euler's noise levels before the shift: along the training's table, or from 1 to 1/steps as FLUX takes them.
    The other solvers have a spacing of their own."""
    base_shift: float = 0.5
    """mu at `base_tokens`."""
    max_shift: float = 1.15
    """mu at `max_tokens`; beyond, the line goes on."""
    base_tokens: int = 256
    max_tokens: int = 4096

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ScheduleSpec:
        """That of a diffusers scheduler_config.json, for a pipeline that passes evenly spaced sigmas (FLUX)."""
        default = ScheduleSpec()
        return ScheduleSpec(
            kind="dynamic" if config.get("use_dynamic_shifting") else "static",
            shift=config.get("shift", default.shift),
            spacing="even",
            base_shift=config.get("base_shift", default.base_shift),
            max_shift=config.get("max_shift", default.max_shift),
            base_tokens=config.get("base_image_seq_len", default.base_tokens),
            max_tokens=config.get("max_image_seq_len", default.max_tokens),
        )

    def mu(self, tokens: int) -> float:
        """Logarithm of the shift for `tokens` image tokens (FluxPipeline's calculate_shift)."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return tokens * slope + (self.base_shift - slope * self.base_tokens)


TABLE = ScheduleSpec()
"""Wan's; its shift comes with the request."""


class Solver:
    """One request's way from noise to data; holds the history of a multistep method, so make one for each request.

    Nothing in it waits for the device: what a step needs besides tensors is in the host's memory.
    """

    restarts: tuple[int, ...] = ()
    """Steps at which the latents change their shape, and nothing from before them can be used."""

    def __init__(
        self,
        name: SolverName,
        steps: int,
        shift: float | None,
        device: torch.device | None = None,
        *,
        spec: ScheduleSpec = TABLE,
        tokens: int | None = None,
        step_list: Sequence[int] | None = None,
        start: int = 0,
    ) -> None:
        """`shift` None: as `spec` says, with `tokens` image tokens where that is dynamic. `step_list`: the timesteps of
        a step-distilled model, for Euler. `start`: leave out so many of the `steps`."""
        if name not in SOLVERS:
            raise ConfigError("sampling.solver", f"unknown solver '{name}'", allowed=", ".join(SOLVERS))
        if steps < 1:
            raise ConfigError("sampling.steps", f"{steps} is not a number of steps", allowed="1 or more")
        if shift is not None and shift <= 0:
            raise ConfigError("sampling.shift", f"{shift} is not a shift", allowed="more than 0")
        if not 0 <= start < steps:
            raise ValueError(f"start {start} of {steps} steps")
        mu = None
        if shift is None and spec.kind == "dynamic":
            if tokens is None:
                raise ValueError("a dynamic shift needs the number of tokens")
            mu = spec.mu(tokens)
        fixed = spec.shift if shift is None else shift
        if step_list is None:
            self._scheduler = _scheduler(name, steps, fixed, mu, spec.spacing)
        else:
            self._scheduler = _distilled(name, steps, fixed, step_list)
        # Without this the scheduler would search its table for each timestep, which reads from the device.
        self._scheduler.set_begin_index(start)
        self.name, self.steps, self._start = name, steps - start, start
        self.shift = fixed if mu is None else float(np.exp(mu))
        self.sigmas: tuple[float, ...] = tuple(self._scheduler.sigmas[start:].tolist())
        """Noise levels of every step and the final 0, `steps + 1` numbers."""
        self.timesteps: Tensor = self._scheduler.timesteps[start:].to(device)
        """[steps] on the device: what the model is told of the noise level, between 0 and 1000."""

    def start(self, shape: tuple[int, ...], draw: Draw, image: Tensor | None = None) -> Tensor:
        """What the loop starts from: noise, or the latents `image`, noised as much as the first step expects."""
        noise = draw(shape)
        return noise if image is None else self.noised(image, noise)

    def noised(self, data: Tensor, noise: Tensor) -> Tensor:
        """`data` at the noise level of the first step."""
        sigma = self._scheduler.sigmas[self._start]
        noised: Tensor = sigma * noise + (1.0 - sigma) * data
        return noised

    def clean(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """The data that step `index` foresees: x - sigma * v, float32."""
        clean: Tensor = latents - self._scheduler.sigmas[self._start + index] * velocity.float()
        return clean

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """Latents after step `index`, from the predicted `velocity`; float32, shape unchanged."""
        timestep = self._scheduler.timesteps[self._start + index]
        result: Tensor = self._scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
        return result.float()


def _scheduler(name: SolverName, steps: int, shift: float, mu: float | None, spacing: str) -> Any:
    """A diffusers scheduler with its noise levels, in the host's memory."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    from lightx2v.sampling.unipc import UniPC

    dynamic = mu is not None
    if name == "euler":
        euler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
        sigmas = np.linspace(1.0, 1 / steps, steps) if spacing == "even" else None
        euler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        return euler
    kind = UniPC if name == "unipc" else DPMSolverMultistepScheduler
    scheduler = kind(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, use_dynamic_shifting=dynamic
    )
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def _distilled(name: SolverName, steps: int, shift: float, step_list: Sequence[int]) -> Any:
    """Euler along `step_list`: the shifted noise levels that LightX2V's step-distilled models were trained at."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    check_step_list(step_list, steps, name)
    table = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
    table = shift * table / (1 + (shift - 1) * table)
    sigmas = table[[TRAIN_STEPS - timestep for timestep in step_list]]
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=sigmas.tolist(), timesteps=(sigmas * TRAIN_STEPS).tolist())
    return euler


def check_step_list(step_list: Sequence[int], steps: int | None = None, solver: str | None = None) -> None:
    """Raise ConfigError for a `denoising_step_list` that is none, or that `steps` or `solver` contradict."""
    key = "sampling.denoising_step_list"
    if not step_list or any(not 1 <= timestep <= TRAIN_STEPS for timestep in step_list):
        raise ConfigError(key, f"{list(step_list)} is not a list of timesteps", allowed=f"1 to {TRAIN_STEPS}")
    if any(a <= b for a, b in pairwise(step_list)):
        raise ConfigError(key, f"{list(step_list)} does not fall", do="order the timesteps from noise to data")
    if steps is not None and steps != len(step_list):
        raise ConfigError(
            "sampling.steps", f"{steps} steps, but {key} has {len(step_list)}", do="leave sampling.steps out"
        )
    if solver is not None and solver != "euler":
        raise ConfigError("sampling.solver", f"'{solver}' does not follow {key}", allowed="euler")


def first_step(steps: int, strength: float) -> int:
    """How many of `steps` an image-to-image request leaves out (FluxImg2ImgPipeline). Raises ConfigError for all."""
    start = int(max(steps - min(steps * strength, steps), 0))
    if start >= steps:
        raise ConfigError(
            "sampling.strength",
            f"{strength} of {steps} steps leaves none",
            do="raise sampling.strength or sampling.steps",
        )
    return start


def noise_source(seed: int, device: torch.device | None = None) -> Draw:
    """Standard normal noise in float32, drawn on the CPU so that a seed gives the same start on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float32).to(device)


def initial_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """The first draw of `noise_source`."""
    return noise_source(seed, device)(shape)
