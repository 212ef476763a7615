"""How far training is: sample prompts with the averaged weights and let the detector judge.

python -m tools.train_tiny.check --work DIR --task t2v --count 48
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightx2v.eval.detector import detect
from lightx2v.io.sheet import contact_sheet
from lightx2v.models.base import Branch
from lightx2v.sampling.loop import denoise, guided
from lightx2v.sampling.schedule import Solver, initial_noise
from tools.train_tiny import clip_vae, world
from tools.train_tiny.checkpoint import load_state
from tools.train_tiny.latents import encode_first_frames, latent_statistics, trained_vae
from tools.train_tiny.train_dit import SHIFT, Model

ATTRIBUTES = ("color", "background", "shape", "motion")


@torch.inference_mode()
def sample(work: Path, task: str, scenes: list[world.Scene], steps: int, guidance: float) -> np.ndarray:
    """Clips [N, T, H, W, 3] uint8 for `scenes`, whose first frames condition image-to-video."""
    state, raw = load_state(work / f"{task}.pt"), load_state(next(work.glob("latents*.pt")))
    assert state is not None and raw is not None
    model = Model(task).eval()
    model.load_state_dict(state["ema"])
    mean, std = latent_statistics(raw["latents"])
    cond = {}
    if task == "i2v":
        frames, first = encode_first_frames(work, scenes, raw["latents"], keep=False)
        cond = {"frame": frames, "latent": first}
    prompts: dict[Branch, list[str]] = {"cond": [scene.prompt for scene in scenes], "uncond": [""] * len(scenes)}

    def predict(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
        velocity: Tensor = model(latents, timestep.float(), prompts[branch], cond)
        return velocity

    noise = initial_noise((len(scenes), 16, 5, 8, 8), 0, torch.device("cpu"))
    latents = denoise(noise, Solver("unipc", steps, SHIFT), guided(predict, guidance)) * std + mean
    vae = trained_vae(work)
    video = torch.cat([clip_vae.decode(vae, part) for part in latents.split(4)])
    pictures: np.ndarray = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", choices=("t2v", "i2v"), required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, help="PNG of the first clips")
    arguments = parser.parse_args()
    scenes = world.random_scenes(arguments.count, torch.Generator().manual_seed(99))
    clips = sample(arguments.work, arguments.task, scenes, arguments.steps, arguments.guidance)
    found = [detect(clip) for clip in clips]
    for name in ATTRIBUTES:
        right = sum(getattr(f, name) == getattr(s, name) for f, s in zip(found, scenes, strict=True))
        print(f"{name:<12}{right}/{len(scenes)}")
    if arguments.sheet is not None:
        from PIL import Image

        rows = [np.concatenate(list(clip[::4]), axis=1) for clip in clips[:12]]
        Image.fromarray(contact_sheet(np.stack(rows), columns=2)).save(arguments.sheet)


if __name__ == "__main__":
    main()
