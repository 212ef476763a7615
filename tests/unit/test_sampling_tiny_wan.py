"""Samplers on tiny-wan: with each of them, and few steps, a clip shows what its prompt says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightx2v
from lightx2v.encoders.umt5 import load_text_encoder
from lightx2v.eval.detector import detect
from lightx2v.eval.metrics import psnr
from lightx2v.eval.prompts import ATTRIBUTES, parse_prompt
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.models.base import Branch, Conditions, run_blocks
from lightx2v.models.spec import FAMILIES
from lightx2v.sampling.loop import Sampler, cfg_scales, denoise, guided
from lightx2v.sampling.resolution import ChangingResolution, plan_stages
from lightx2v.sampling.schedule import Solver, noise_source
from lightx2v.vae.wan import load_vae

CPU = torch.device("cpu")
SHAPE = (1, 16, 5, 8, 8)
SHIFT, GUIDANCE = 3.0, 1.5
PROMPTS = ("a red circle on a white background moves right", "a blue square on a gray background grows")

Generate = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def generate() -> Generate:
    root = Path(lightx2v.__file__).parent / "assets" / "tiny-wan"
    family = FAMILIES["wan2.1"]
    files = family.detect(root, "t2v")
    with torch.device("meta"):
        model: Any = family.build_dit(files.arch)
    weights = Checkpoint.open(root / "diffusion_pytorch_model.safetensors").stream()
    stream_into(model, weights, device=CPU, dtype_of=lambda name: torch.float32, where="tiny-wan")
    text, tokenizer = files.require("text_encoder"), files.require("tokenizer")
    encoder = load_text_encoder(text, tokenizer, device=CPU, dtype=torch.float32, quant_plans={})
    vae = load_vae(files.require("vae"), device=CPU)

    @torch.inference_mode()
    def run(prompt: str, sampler: Sampler, guidance: float | Sequence[float] = GUIDANCE) -> np.ndarray:
        prompts: dict[Branch, str] = {"cond": prompt, "uncond": ""}
        prepared = {
            branch: model.prepare(Conditions(text=encoder.encode([text], files.arch.text_len)[0]))
            for branch, text in prompts.items()
        }
        times = model.embed_time(sampler.timesteps)

        def predict(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
            stream, context = model.embed(latents, times.at(step), prepared[branch], step=step, branch=branch)
            velocity: Tensor = model.head(run_blocks(model, stream, context), context)
            return velocity

        latents = denoise(sampler.start(SHAPE, noise_source(1)), sampler, guided(predict, guidance))
        frames: np.ndarray = ((vae.decode(latents)[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        return frames

    return run


def shows(clip: np.ndarray, prompt: str) -> bool:
    return all(getattr(detect(clip), name) == getattr(parse_prompt(prompt), name) for name in ATTRIBUTES)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", ["unipc", "euler", "dpm++"])
def test_every_solver_makes_the_clip(name: Any, steps: int, prompt: str, generate: Generate) -> None:
    assert shows(generate(prompt, Solver(name, steps, SHIFT)), prompt)


def test_solvers_of_higher_order_are_nearer_to_many_steps(generate: Generate) -> None:
    exact = generate(PROMPTS[0], Solver("euler", 200, SHIFT), 1.0)
    euler, dpm, unipc = (
        psnr(generate(PROMPTS[0], Solver(name, 20, SHIFT), 1.0), exact) for name in ("euler", "dpm++", "unipc")
    )
    assert unipc > euler and dpm > euler


def test_a_step_list_makes_the_clip(generate: Generate) -> None:
    sampler = Solver("euler", 4, 5.0, step_list=[1000, 750, 500, 250])
    assert shows(generate(PROMPTS[0], sampler, 1.0), PROMPTS[0])


def test_guidance_in_the_first_half_is_nearly_all_of_it(generate: Generate) -> None:
    full, half, none = (
        generate(PROMPTS[0], Solver("unipc", 20, SHIFT), guidance)
        for guidance in (GUIDANCE, cfg_scales(20, GUIDANCE, ":10"), 1.0)
    )
    assert psnr(half, full) > max(30, psnr(none, full))
    assert shows(half, PROMPTS[0])


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("rates", "changes"), [([0.5], [5]), ([0.75], [10]), ([1.0, 0.75], [4, 12])])
def test_changing_resolution_makes_the_clip(
    rates: list[float], changes: list[int], prompt: str, generate: Generate
) -> None:
    stages = plan_stages(20, rates, changes)
    sampler = ChangingResolution("unipc", 20, SHIFT, stages=stages, shape=SHAPE, patch=(1, 2, 2))
    clip = generate(prompt, sampler)
    assert clip.shape == (17, 64, 64, 3)
    assert shows(clip, prompt)
