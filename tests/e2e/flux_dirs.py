"""Whole tiny FLUX.1 model directories with random weights, in every layout, and the pipelines of diffusers for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from safetensors.torch import load_file, save_file

from lightx2v.encoders import clip_text, t5
from lightx2v.vae.kl import PREFIX as VAE_PREFIX
from tests.models.tiny_flux import Layout, tiny_transformer, write_dit
from tests.models.tiny_flux_parts import (
    tiny_clip_text,
    tiny_clip_tokenizer,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae,
    write_clip_text,
    write_t5,
    write_vae,
)

PIPELINES: dict[str, Any] = {
    "dev": FluxPipeline,
    "schnell": FluxPipeline,
    "kontext": FluxKontextPipeline,
    "strength": FluxImg2ImgPipeline,
}


def scheduler(variant: str) -> FlowMatchEulerDiscreteScheduler:
    """As the published directories describe it."""
    if variant == "schnell":
        return FlowMatchEulerDiscreteScheduler(shift=1.0, base_shift=0.5, max_shift=1.15)
    return FlowMatchEulerDiscreteScheduler(shift=3.0, base_shift=0.5, max_shift=1.15, use_dynamic_shifting=True)


def write_model(folder: Path, variant: str, layout: Layout) -> Path:
    """A complete model directory; returns what to give as `model_path`: the directory, or a file with all the parts."""
    folder.mkdir(parents=True)
    name = f"flux1-{'dev' if variant == 'strength' else variant}.safetensors"
    weights = write_dit(tiny_transformer(variant != "schnell"), folder, layout, name)
    beside = "diffusers" if layout == "diffusers" else "original"
    t5_path, _ = write_t5(tiny_t5(), folder, beside)
    clip_path, _ = write_clip_text(tiny_clip_text(), folder, beside)
    vae_path = write_vae(tiny_vae(), folder, beside)
    if layout == "diffusers":
        scheduler(variant).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[variant].__name__}))
    if layout != "comfyui":
        return folder
    state = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith(VAE_PREFIX)}
    for prefix, path in ((t5.PREFIX, t5_path), (clip_text.PREFIX, clip_path), (VAE_PREFIX, vae_path)):
        state |= {f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}
        path.unlink()
    save_file(state, weights)
    return weights


def build_pipeline(variant: str) -> Any:
    """diffusers' pipeline of the same weights, float32 on the CPU."""
    pipe = PIPELINES[variant](
        scheduler=scheduler(variant),
        vae=tiny_vae(),
        transformer=tiny_transformer(variant != "schnell"),
        text_encoder=tiny_clip_text(),
        tokenizer=tiny_clip_tokenizer(),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)
