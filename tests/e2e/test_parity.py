"""The whole pipeline against diffusers' own, float32 on the CPU, random weights, one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightx2v.config.load import load_config
from lightx2v.pipeline import LightX2VPipeline
from tests.e2e.model_dirs import SHIFT, build_pipeline, write_model

PROMPT, NEGATIVE, STEPS, GUIDANCE, SEED = "a red circle on a black background", "left", 4, 3.0, 11


def picture(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([4 * x, 3 * y, 255 - 2 * x - y], -1).clip(0, 255).astype(np.uint8))


def diffusers_frames(task: str, height: int, width: int, frames: int) -> np.ndarray:
    extra: dict[str, Any] = {"image": picture(height, width)} if task == "i2v" else {}
    result = build_pipeline(task)(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        **extra,
    )
    return np.asarray(result.frames[0]) * 255


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize(("height", "width", "frames"), [(64, 48, 9), (32, 80, 5)])
def test_pipeline_matches_diffusers(
    tmp_path: Path, task: str, layout: str, height: int, width: int, frames: int
) -> None:
    model = write_model(tmp_path / "model", task, layout)
    image_path = tmp_path / "first.png"
    picture(height, width).save(image_path)
    overrides = {
        "task": task,
        "model_path": str(model),
        "device": "cpu",
        "dtype": "float32",
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "seed": SEED,
        "image_path": str(image_path) if task == "i2v" else None,
        "video.height": height,
        "video.width": width,
        "video.frames": frames,
        "sampling.steps": STEPS,
        "sampling.guidance": GUIDANCE,
        "sampling.shift": SHIFT,
    }
    ours = LightX2VPipeline.from_config(load_config(None, overrides, [])).generate(quiet=True).astype(np.float64)
    theirs = diffusers_frames(task, height, width, frames)
    assert ours.shape == theirs.shape
    assert theirs.std() > 2, "the comparison says nothing about a blank video"
    psnr = 10 * np.log10(255**2 / np.mean((ours - theirs.round()) ** 2).clip(1e-10))
    assert psnr >= 50
