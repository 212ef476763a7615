"""Finish tiny-wan's VAE: its decoder alone, on the latents of whole clips at full size.

    python -m tools.train_tiny.train_decoder --work DIR

The encoder stands still, so the DiT can train on the same latents meanwhile. Training resumes from DIR/decoder.pt.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.train_tiny import clip_vae, world
from tools.train_tiny.checkpoint import load_state, save_state
from tools.train_tiny.latents import encode_world, trained_vae
from tools.train_tiny.train_vae import LATENT_NOISE

STEPS, BATCH, LR = 1200, 2, 3e-4


def decoder_state(vae: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained here."""
    return {n: v for n, v in vae.state_dict().items() if n.startswith(("decoder.", "post_quant_conv."))}


def train(work: Path, repeats: int = 8, seed: int = 1) -> None:
    """Run to the end of STEPS, saving every 100 steps."""
    vae = trained_vae(work)
    vae.requires_grad_(False)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    scenes, _ = encode_world(work, repeats)
    stored = load_state(work / f"latents{repeats}.pt")
    assert stored is not None
    latents = stored["latents"]
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.99))
    state, begin = load_state(work / "decoder.pt"), 0
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    began, errors = time.perf_counter(), []
    for step in range(begin, STEPS):
        generator = torch.Generator().manual_seed(seed + step)
        rows = torch.randint(len(scenes), (BATCH,), generator=generator)
        clips = world.render([scenes[row] for row in rows.tolist()])
        given = latents[rows]
        drawn = clip_vae.decode(vae, given + LATENT_NOISE * torch.randn(given.shape, generator=generator))
        squared = F.mse_loss(drawn, clips)
        loss = squared + 0.05 * F.l1_loss(drawn, clips)
        rate = LR * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        errors.append(squared.item())
        if (step + 1) % 100 == 0 or step + 1 == STEPS:
            mean = sum(errors[-100:]) / len(errors[-100:])
            seconds = time.perf_counter() - began
            print(f"decoder {step + 1}/{STEPS} psnr {-10 * math.log10(mean / 4):.2f} dB {seconds:.0f} s", flush=True)
            kept = {"model": decoder_state(vae), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(work / "decoder.pt", kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    train(parser.parse_args().work)
