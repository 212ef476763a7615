"""The trained VAE, and the latents of the world that the diffusion transformers and the decoder learn from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tools.train_tiny import clip_vae, world
from tools.train_tiny.checkpoint import load_state, save_state


@torch.no_grad()
def encode_world(work: Path, repeats: int) -> tuple[list[world.Scene], Tensor]:
    """Every scene `repeats` times with its own jitter, and their normalized latents [N, 16, 5, 8, 8]; kept on disk."""
    generator = torch.Generator().manual_seed(7)
    scenes = []
    for _ in range(repeats):
        for scene in world.all_scenes():
            dx, dy = ((torch.rand(2, generator=generator) * 2 - 1) * world.JITTER).tolist()
            scenes.append(world.Scene(scene.color, scene.shape, scene.background, scene.motion, dx, dy))
    path = work / f"latents{repeats}.pt"
    saved = load_state(path)
    if saved is None:
        vae = trained_vae(work)
        parts = [clip_vae.encode(vae, world.render(scenes[i : i + 6]))[0] for i in range(0, len(scenes), 6)]
        latents = torch.cat(parts)
        saved = {"latents": latents}
        save_state(path, saved)
    mean, std = latent_statistics(saved["latents"])
    return scenes, (saved["latents"] - mean) / std


def latent_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, [1, 16, 1, 1, 1]; exported as part of the VAE's weights."""
    return latents.mean((0, 2, 3, 4), keepdim=True), latents.std((0, 2, 3, 4), keepdim=True)


def trained_vae(work: Path) -> nn.Module:
    """The VAE at its latest saved step, for whole clips."""
    state = load_state(work / "vae.pt")
    if state is None:
        raise SystemExit(f"{work}/vae.pt is missing: run tools.train_tiny.train_vae first")
    vae = clip_vae.as_clip_vae(clip_vae.build_vae())
    vae.load_state_dict(state["model"])
    finished = load_state(work / "decoder.pt")
    if finished is not None:
        vae.load_state_dict(finished["model"], strict=False)
    return vae.eval()


@torch.no_grad()
def encode_first_frames(work: Path, scenes: list[world.Scene], raw: Tensor, keep: bool = True) -> tuple[Tensor, Tensor]:
    """First frames [N, 3, 64, 64] and their conditions [N, 20, 5, 8, 8]: mask, then latents of frame and gray."""
    frames = torch.cat([world.render([scene])[:, :, 0] for scene in scenes])
    path = work / f"first{len(scenes)}.pt"
    saved = load_state(path) if keep else None
    if saved is None:
        vae = trained_vae(work)
        parts = []
        for batch in frames.split(6):
            clip = torch.zeros(len(batch), 3, 17, 64, 64)
            clip[:, :, 0] = batch
            parts.append(clip_vae.encode(vae, clip)[0])
        saved = {"latents": torch.cat(parts)}
        if keep:
            save_state(path, saved)
    mean, std = latent_statistics(raw)
    latents = (saved["latents"] - mean) / std
    mask = torch.zeros(len(scenes), 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return frames, torch.cat([mask, latents], 1)
