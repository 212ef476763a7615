"""Write tiny-wan as a Wan2.1 checkpoint in the original layout.

    python -m tools.train_tiny.export --work DIR --output lightx2v/assets/tiny-wan

Wan's VAE has fixed means and deviations of its latents; those of the trained VAE are folded into its two 1x1x1
convolutions, so that the constants hold for it too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from lightx2v.encoders.keymap import CLIP, T5
from lightx2v.io.weights import write_safetensors
from lightx2v.vae.keymap import layer_names, rename
from tools.train_tiny import clip_vae, text
from tools.train_tiny.checkpoint import load_state
from tools.train_tiny.latents import latent_statistics, trained_vae
from tools.train_tiny.train_dit import architecture

DEFAULTS = {
    "t2v": {"steps": 20, "shift": 3.0, "guidance": 1.5, "height": 64, "width": 64, "frames": 17, "fps": 8},
    "i2v": {"steps": 20, "shift": 3.0, "guidance": 2.0, "height": 64, "width": 64, "frames": 17, "fps": 8},
}
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Scale and shift the latents of `vae` in place so that Wan's constants normalize them."""
    wan_mean = torch.tensor(vae.config.latents_mean)
    wan_std = torch.tensor(vae.config.latents_std)
    mean, std = mean.flatten(), std.flatten()
    z = len(mean)
    ratio = wan_std / std
    out = vae.quant_conv
    out.weight[:z] *= ratio[:, None, None, None, None]
    out.bias[:z] = (out.bias[:z] - mean) * ratio + wan_mean
    out.weight[z:] = 0
    out.bias[z:] = -6.0  # the log-variance was not trained; Wan reads the mean only
    back = vae.post_quant_conv
    matrix = back.weight[:, :, 0, 0, 0].clone()
    back.bias += matrix @ (mean - wan_mean / ratio)
    back.weight /= ratio[None, :, None, None, None]


def vae_tensors(work: Path) -> dict[str, Tensor]:
    """The VAE under its original names."""
    wrapped = trained_vae(work)
    plain = clip_vae.build_vae()
    plain.load_state_dict({name.replace(".layer.", "."): value for name, value in wrapped.state_dict().items()})
    raw = next(work.glob("latents*.pt"))
    state = load_state(raw)
    assert state is not None
    fold_latent_statistics(plain, *latent_statistics(state["latents"]))
    back = {target: original for original, target in layer_names(4, 1).items()}
    return {str(rename(name, back)): value for name, value in plain.state_dict().items()}


def shrink(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in bfloat16; vectors stay in float32, where they cost little and matter most."""
    return {n: t.to(torch.bfloat16 if t.numel() > 4096 else torch.float32).contiguous() for n, t in tensors.items()}


def split_by_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The CLIP tower under its original names, with q, k and v in one tensor as there."""
    plain = {
        name.removeprefix("vision_model."): value for name, value in state.items() if not name.endswith("position_ids")
    }
    out: dict[str, Tensor] = {}
    for name, value in plain.items():
        original = CLIP.to_original(name)
        if original is None:
            raise SystemExit(f"no original name for {name}")
        if ".to_qkv." in original:
            if ".q_proj." in name:
                out[original] = torch.cat(
                    [plain[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                )
            continue
        if original == "visual.cls_embedding":
            value = value.reshape(1, 1, -1)
        if original == "visual.pos_embedding":
            value = value[None]
        out[original] = value
    return out


def export(work: Path, output: Path) -> None:
    """Write every part that is trained; the image-to-video parts only when they are."""
    output.mkdir(parents=True, exist_ok=True)
    states: dict[str, Any] = {task: load_state(work / f"{task}.pt") for task in ("t2v", "i2v")}
    for task, state in states.items():
        if state is None:
            continue
        folder = output if task == "t2v" else output / task
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(architecture(task), indent=2) + "\n")
        weights = shrink(split_by_prefix(state["ema"], "dit."))
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    encoder = split_by_prefix(states["t2v"]["ema"], "text_encoder.encoder.")
    torch.save(shrink({str(T5.to_original(name)): value for name, value in encoder.items()}), output / T5_FILE)
    if states["i2v"] is not None:
        torch.save(shrink(clip_tensors(split_by_prefix(states["i2v"]["ema"], "image_encoder."))), output / CLIP_FILE)
    torch.save(shrink(vae_tensors(work)), output / "Wan2.1_VAE.pth")
    text.write_tokenizer(output / "google" / "umt5-xxl")
    (output / "lightx2v_defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    export(arguments.work, arguments.output)
