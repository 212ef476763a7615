"""Train tiny-wan's VAE on small windows: single frames first, then clips. `train_decoder` finishes it at full size.

    python -m tools.train_tiny.train_vae --work DIR

The temporal taps start as the identity when clips begin, so that stage 2 opens with every frame group drawn as its
last frame and only has to learn what moves in between. Training resumes from DIR/vae.pt.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.nn import functional as F

from tools.train_tiny import clip_vae, world
from tools.train_tiny.checkpoint import load_state, save_state


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of training on [batch, 3, frames, size, size] windows of the world."""

    name: str
    steps: int
    batch: int
    frames: int
    size: int
    lr: float


#: The learning rate matters: 5e-4 does not learn at all from scratch.
STAGES = (
    Stage("frames", 4000, 16, 1, 32, 2e-4),
    Stage("clips", 4000, 4, 9, 32, 2e-4),
)
#: Noise on the latent in training: what the sampler leaves over must not show in the picture.
LATENT_NOISE = 0.1


def window(stage: Stage, generator: torch.Generator) -> Tensor:
    """A batch of random windows in space and time, [batch, 3, frames, size, size]."""
    scenes = world.random_scenes(stage.batch, generator)
    clips = world.render(scenes)
    out = []
    for clip in clips:
        t = int(torch.randint(17 - stage.frames + 1, (), generator=generator))
        y, x = (int(v) for v in torch.randint(2, 64 - stage.size - 1, (2,), generator=generator))
        out.append(clip[:, t : t + stage.frames, y : y + stage.size, x : x + stage.size])
    return torch.stack(out)


@torch.no_grad()
def start_temporal_layers_as_identity(vae: AutoencoderKLWan) -> None:
    """Single frames never reach the earlier taps of a causal kernel: silence them, and pass frames through in time."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
            module.weight[:, :, :2] = 0
        if isinstance(module, clip_vae.ClipResample) and "3d" in module.layer.mode:
            conv = module.layer.time_conv
            conv.weight.zero_()
            conv.bias.zero_()
            channels = conv.in_channels
            for half in range(conv.out_channels // channels):
                conv.weight[half * channels : (half + 1) * channels, :, -1, 0, 0] = torch.eye(channels)


def psnr(vae: AutoencoderKLWan, scenes: list[world.Scene]) -> float:
    """Mean PSNR in dB of reconstructed whole clips."""
    with torch.no_grad():
        clips = world.render(scenes)
        mean, _ = clip_vae.encode(vae, clips)
        error = ((clip_vae.decode(vae, mean).clamp(-1, 1) - clips) / 2).pow(2).mean(dim=(1, 2, 3, 4))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def train(work: Path, stages: tuple[Stage, ...] = STAGES, seed: int = 0) -> AutoencoderKLWan:
    """Run every stage, resuming from `work`/vae.pt; returns the trained module."""
    torch.manual_seed(seed)
    vae = clip_vae.as_clip_vae(clip_vae.build_vae())
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-4, betas=(0.9, 0.99))
    state = load_state(work / "vae.pt")
    stage_index, step = 0, 0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stage_index, step = state["stage"], state["step"]
    held_out = world.random_scenes(8, torch.Generator().manual_seed(10_000))
    for index in range(stage_index, len(stages)):
        stage = stages[index]
        if step == 0 and index > 0 and stages[index - 1].frames == 1:
            start_temporal_layers_as_identity(vae)
        began = time.perf_counter()
        while step < stage.steps:
            generator = torch.Generator().manual_seed(seed + 1_000_003 * index + step)
            clips = window(stage, generator)
            rate = stage.lr * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps) * 0.9)
            for group in optimizer.param_groups:
                group["lr"] = rate
            mean, _ = clip_vae.encode(vae, clips)
            latent = mean + LATENT_NOISE * torch.randn(mean.shape, generator=generator)
            drawn = clip_vae.decode(vae, latent)
            loss = F.mse_loss(drawn, clips) + 0.05 * F.l1_loss(drawn, clips) + 1e-4 * mean.pow(2).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 250 == 0 or step == stage.steps:
                seconds = time.perf_counter() - began
                quality = f"loss {loss.item():.5f} psnr {psnr(vae, held_out):.2f} dB"
                print(f"{stage.name} {step}/{stage.steps} {quality} {seconds:.0f} s", flush=True)
                save_state(
                    work / "vae.pt",
                    {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "stage": index, "step": step},
                )
        step = 0
    return vae


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    train(parser.parse_args().work)
