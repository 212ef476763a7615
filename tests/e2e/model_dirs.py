"""Whole tiny model directories with random weights, in both layouts, and the diffusers pipelines that read them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from transformers import CLIPImageProcessorPil

from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from tests.models.tiny_checkpoints import diffusers_twin, write_dit
from tests.models.tiny_encoders import (
    clip_original,
    t5_original,
    tiny_clip,
    tiny_t5,
    tiny_tokenizer,
    tiny_vae,
    vae_original,
    write_clip,
    write_t5,
    write_vae,
)

SHIFT = 3.0
__all__ = ["SHIFT", "build_pipeline", "clip_original", "t5_original", "vae_original", "write_model"]


def random_dit(task: str) -> WanDiT:
    """A DiT whose widths fit the tiny encoders (text 32, image 160)."""
    arch = WanArch(
        dim=128,
        ffn_dim=256,
        num_heads=4,
        num_layers=2,
        in_dim=36 if task == "i2v" else 16,
        freq_dim=32,
        text_dim=32,
        image_dim=160,
        model_type=task,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        dit = WanDiT(arch).eval()
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.02))
    return dit


def write_model(folder: Path, task: str, layout: str) -> Path:
    """A complete model directory for `task` in `layout` ("original" or "diffusers")."""
    write_dit(random_dit(task), folder, layout)
    write_t5(tiny_t5(), folder, layout)
    write_vae(tiny_vae(), folder, layout)
    if task == "i2v":
        write_clip(tiny_clip(), folder, layout)
    return folder


def build_pipeline(task: str) -> WanPipeline | WanImageToVideoPipeline:
    """diffusers' pipeline of the same weights, float32 on the CPU."""
    parts = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_t5(),
        "vae": tiny_vae(),
        "transformer": diffusers_twin(random_dit(task)),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    }
    if task == "t2v":
        pipe = WanPipeline(**parts)
    else:
        size = 28
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        pipe = WanImageToVideoPipeline(**parts, image_encoder=tiny_clip(), image_processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe
