"""Train tiny-wan's diffusion transformers on the latents of a trained VAE.

    python -m tools.train_tiny.train_dit --work DIR --task t2v        # DiT and text encoder together
    python -m tools.train_tiny.train_dit --work DIR --task i2v        # starts from t2v; trains DiT and image encoder

Flow matching (Lipman et al. 2022) with Wan's shifted noise levels; one prompt in ten is empty, for guidance.
Training resumes from DIR/<task>.pt.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.models.base import Conditions
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from tools.train_tiny import image, text, world
from tools.train_tiny.checkpoint import load_state, save_state
from tools.train_tiny.latents import encode_first_frames, encode_world

SHIFT = 3.0
DROPPED_PROMPTS = 0.1
EMA = 0.998


@dataclass(frozen=True, slots=True)
class Run:
    """Length and pace of one training run."""

    steps: int
    batch: int
    lr: float


RUNS = {"t2v": Run(7500, 16, 1e-3), "i2v": Run(2500, 16, 5e-4)}


def architecture(task: str) -> dict[str, object]:
    """The `config.json` of tiny-wan, keys as in Wan2.1."""
    return {
        "_class_name": "WanModel",
        "model_type": task,
        "dim": 256,
        "ffn_dim": 512,
        "freq_dim": 256,
        "in_dim": 16 if task == "t2v" else 36,
        "out_dim": 16,
        "num_heads": 4,
        "num_layers": 4,
        "text_dim": 128,
        "text_len": text.TEXT_LEN,
        "eps": 1e-6,
    } | ({"image_dim": image.WIDTH, "clip_num_heads": image.HEADS} if task == "i2v" else {})


class Model(nn.Module):
    """What is trained together: the DiT and the encoders that feed it."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task
        self.dit = WanDiT(WanArch.from_config(architecture(task)))
        self.text_encoder = text.build_text_encoder()
        self.image_encoder = image.build_image_encoder() if task == "i2v" else None

    def forward(self, latents: Tensor, timestep: Tensor, prompts: list[str], cond: dict[str, Tensor]) -> Tensor:
        """Predicted velocity [B, 16, t, h, w]."""
        tokens = None
        if self.image_encoder is not None:
            tokens = image.encode(self.image_encoder, cond["frame"])
        conditions = Conditions(text=text.encode(self.text_encoder, prompts), image=tokens, latent=cond.get("latent"))
        velocity: Tensor = self.dit(latents, timestep, conditions)
        return velocity


@torch.no_grad()
def initialize(model: Model, work: Path) -> None:
    """T2V: the output starts at zero. I2V: everything from the trained T2V, the new input channels at zero."""
    if model.task == "t2v":
        nn.init.zeros_(model.dit.head.head.weight)
        nn.init.zeros_(model.dit.head.head.bias)
        return
    state = load_state(work / "t2v.pt")
    if state is None:
        raise SystemExit(f"{work}/t2v.pt is missing: train t2v first")
    trained = state["ema"]
    wide = model.dit.patch_embedding.weight.clone().zero_()
    wide[:, :16] = trained["dit.patch_embedding.weight"]
    missing = model.load_state_dict({**trained, "dit.patch_embedding.weight": wide}, strict=False)
    if missing.unexpected_keys:
        raise SystemExit(f"t2v.pt does not fit: {missing.unexpected_keys[:3]}")
    for block in model.dit.blocks:
        nn.init.zeros_(block.cross_attn.v_img.weight)


def spoken(scene: world.Scene, chance: float) -> str:
    """The scene's prompt, or no prompt, by `chance` in [0, 1); "a orange" and "an orange" are both learnt."""
    if chance < DROPPED_PROMPTS:
        return ""
    return scene.prompt.replace("a orange", "an orange") if chance < 0.55 else scene.prompt


def train(work: Path, task: str, repeats: int = 8, seed: int = 0, device: str = "cpu") -> Model:
    """Run to the end of `RUNS[task]`; returns the model with averaged weights."""
    run = RUNS[task]
    torch.manual_seed(seed)
    scenes, latents = encode_world(work, repeats)
    frames = first = None
    if task == "i2v":
        raw = load_state(work / f"latents{repeats}.pt")
        assert raw is not None
        frames, first = encode_first_frames(work, scenes, raw["latents"])
    model = Model(task)
    initialize(model, work)
    if task == "i2v":
        model.text_encoder.requires_grad_(False)  # both tasks share the text encoder that came with t2v
    model.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=run.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    state, begin = load_state(work / f"{task}.pt"), 0
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    losses, began = [], time.perf_counter()
    for step in range(begin, run.steps):
        generator = torch.Generator().manual_seed(seed + step)
        rows = torch.randint(len(scenes), (run.batch,), generator=generator)
        data = latents[rows].to(device)
        prompts = [spoken(scenes[row], float(torch.rand((), generator=generator))) for row in rows.tolist()]
        # Stratified levels: one in each of B equal parts, which halves the variance of the loss.
        uniform = (torch.arange(run.batch) + torch.rand(run.batch, generator=generator)) / run.batch
        sigma = (SHIFT * uniform / (1 + (SHIFT - 1) * uniform)).to(device)
        noise = torch.randn(data.shape, generator=generator).to(device)
        level = sigma[:, None, None, None, None]
        cond = {}
        if frames is not None and first is not None:
            cond = {"frame": frames[rows].to(device), "latent": first[rows].to(device)}
        with torch.autocast(device, dtype=torch.bfloat16):
            velocity = model((1 - level) * data + level * noise, sigma * 1000, prompts, cond)
        loss = F.mse_loss(velocity.float(), noise - data)
        rate = run.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / run.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == run.steps:
            mean = sum(losses[-250:]) / len(losses[-250:])
            print(f"{task} {step + 1}/{run.steps} loss {mean:.4f} {time.perf_counter() - began:.0f} s", flush=True)
            save_state(
                work / f"{task}.pt",
                {
                    "model": model.state_dict(),
                    "ema": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
    return average


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--task", choices=tuple(RUNS), required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    train(arguments.work, arguments.task, device=arguments.device)
