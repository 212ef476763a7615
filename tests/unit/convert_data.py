"""Tiny checkpoints for the converter's tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v.convert.cli import main
from lightx2v.models.wan.keymap import to_diffusers

CONFIG = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "model_type": "t2v", "text_dim": 16, "in_dim": 4}
CONFIG |= {"out_dim": 4, "freq_dim": 8, "text_len": 512, "eps": 1e-6, "_class_name": "WanModel"}
LAYERS = (*(f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"), "ffn.0", "ffn.2")


def wan(dim: int = 24, ffn: int = 40, blocks: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The tensors of a Wan DiT by their original names, random."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (dim, 4, 1, 2, 2), "patch_embedding.bias": (dim,)}
    shapes |= {"text_embedding.0.weight": (dim, 16), "head.modulation": (1, 2, dim), "head.head.weight": (16, dim)}
    for index in range(blocks):
        for layer in LAYERS:
            n, k = {"ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}.get(layer, (dim, dim))
            shapes |= {f"blocks.{index}.{layer}.weight": (n, k), f"blocks.{index}.{layer}.bias": (n,)}
        shapes |= {f"blocks.{index}.modulation": (1, 6, dim), f"blocks.{index}.norm3.weight": (dim,)}
        shapes |= {f"blocks.{index}.self_attn.norm_q.weight": (dim,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_wan(folder: Path, tensors: dict[str, Tensor], layout: str = "original") -> Path:
    """A directory with the weights in two files, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "diffusers":
        tensors = {to_diffusers(name): tensor for name, tensor in tensors.items()}
    names = list(tensors)
    for index in range(2):
        part = {name: tensors[name] for name in names[index::2]}
        save_file(part, folder / f"diffusion_pytorch_model-{index + 1:05d}-of-00002.safetensors")
    if layout == "original":
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(source: Path, output: Path, *flags: str) -> int:
    return main(["--source", str(source), "--output", str(output), *flags])


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
