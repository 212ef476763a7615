"""The whole FLUX.1 pipeline against diffusers' own, float32 on the CPU, random weights, one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from lightx2v.config.load import load_config
from lightx2v.families import flux
from lightx2v.models.flux.layout import detect
from lightx2v.pipeline import LightX2VPipeline
from tests.e2e.flux_dirs import build_pipeline, write_model
from tests.models import tiny_flux

PROMPT, NEGATIVE, STEPS, SEED, TEXT_LEN = "a red circle on black", "green", 4, 11, 32
STRENGTH = 0.6
REFERENCES = [(96, 64), (64, 96), (64, 64)]
CASES = [
    *(("dev", layout, (64, 48), {}) for layout in tiny_flux.LAYOUTS),
    ("dev", "diffusers", (32, 80), {"sampling.true_guidance": 2.5, "sampling.guidance": 2.0}),
    *(("schnell", layout, (48, 64), {}) for layout in tiny_flux.LAYOUTS),
    *(("kontext", layout, (64, 48), {}) for layout in tiny_flux.LAYOUTS),
    ("strength", "original", (64, 96), {"sampling.strength": STRENGTH}),
    ("strength", "diffusers", (64, 96), {"sampling.strength": STRENGTH, "sampling.steps": 7}),
]


def picture(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([4 * x, 3 * y, 255 - 2 * x - y], -1).clip(0, 255).astype(np.uint8))


def run_diffusers(variant: str, height: int, width: int, settings: dict[str, Any]) -> np.ndarray:
    extra: dict[str, Any] = {}
    if variant in ("kontext", "strength"):
        extra["image"] = picture(64, 96)
    if variant == "kontext":
        extra["max_area"] = height * width
    if "sampling.strength" in settings:
        extra["strength"] = settings["sampling.strength"]
    if "sampling.true_guidance" in settings:
        extra |= {"true_cfg_scale": settings["sampling.true_guidance"], "negative_prompt": NEGATIVE}
    result = build_pipeline(variant)(
        prompt=PROMPT,
        height=height,
        width=width,
        num_inference_steps=settings.get("sampling.steps", STEPS),
        guidance_scale=settings.get("sampling.guidance", 3.5),
        max_sequence_length=TEXT_LEN,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        **extra,
    )
    return np.asarray(result.images[0]) * 255


def run_ours(model: Path, task: str, height: int, width: int, **settings: Any) -> np.ndarray:
    overrides = {
        "model_cls": "flux",
        "task": task,
        "model_path": str(model),
        "device": "cpu",
        "dtype": "float32",
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "seed": SEED,
        "text_len": TEXT_LEN,
        "video.height": height,
        "video.width": width,
        "sampling.steps": STEPS,
        **settings,
    }
    frames = LightX2VPipeline.from_config(load_config(None, overrides, [])).generate(quiet=True)
    assert frames.shape == (1, height, width, 3)
    return frames[0].astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2).clip(1e-10)))


@pytest.fixture
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference pictures of Kontext, a thousand times smaller than the trained sizes."""
    monkeypatch.setattr(flux, "REFERENCE_SIZES", REFERENCES)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", REFERENCES)


@pytest.fixture
def plain_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image-to-image of diffusers starts from a sample of the encoder's posterior; the engine takes its mode."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.mark.usefixtures("small_references", "plain_posterior")
@pytest.mark.parametrize(("variant", "layout", "size", "settings"), CASES)
def test_pipeline_matches_diffusers(
    tmp_path: Path, variant: str, layout: tiny_flux.Layout, size: tuple[int, int], settings: dict[str, Any]
) -> None:
    model = write_model(tmp_path / "model", variant, layout)
    picture(64, 96).save(tmp_path / "picture.png")
    image = {"image_path": str(tmp_path / "picture.png")} if variant in ("kontext", "strength") else {}
    guidance = {"sampling.guidance": 3.5} if variant != "schnell" else {}
    ours = run_ours(model, "i2i" if image else "t2i", *size, **image, **{**guidance, **settings})
    theirs = run_diffusers(variant, *size, settings)
    assert theirs.std() > 2, "the comparison says nothing about a blank image"
    assert psnr(ours, theirs.round()) >= 50


def test_the_trained_sizes_of_references_are_those_of_diffusers() -> None:
    assert list(flux.REFERENCE_SIZES) == pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS


@pytest.mark.parametrize("layout", tiny_flux.LAYOUTS)
def test_every_part_is_found(tmp_path: Path, layout: tiny_flux.Layout) -> None:
    model = write_model(tmp_path / "model", "dev", layout)
    files = detect(model, "t2i")
    parts = ("dit", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    assert all(files.require(part).exists() for part in parts)
    assert len({files.require(part) for part in parts}) == (3 if layout == "comfyui" else 6)
