"""Tiny Wan DiTs with random weights, written to disk in the original layout and in diffusers'.

Names are translated by diffusers' own converter, apart from the package's tables, so that a wrong table fails.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import nn

from lightx2v.models.base import Conditions
from lightx2v.models.wan import keymap
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from lightx2v.models.wan.layout import WanFiles


def tiny_arch(model_type: str, dim: int = 128, num_heads: int = 4, num_layers: int = 2) -> WanArch:
    return WanArch(
        dim=dim,
        ffn_dim=2 * dim,
        num_heads=num_heads,
        num_layers=num_layers,
        in_dim=36 if model_type == "i2v" else 16,
        freq_dim=32,
        text_dim=24,
        image_dim=40,
        model_type=model_type,
    )


def tiny_dit(model_type: str, seed: int = 0, **sizes: int) -> WanDiT:
    """A DiT in which every parameter is random, norms and biases too, so that none can be left out unnoticed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dit = WanDiT(tiny_arch(model_type, **sizes)).eval()
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.02))
    return dit


def diffusers_twin(dit: WanDiT) -> WanTransformer3DModel:
    """diffusers' model with the weights of `dit`."""
    arch = dit.arch
    image = arch.model_type == "i2v"
    twin = WanTransformer3DModel(
        num_attention_heads=arch.num_heads,
        attention_head_dim=arch.head_dim,
        in_channels=arch.in_dim,
        out_channels=arch.out_dim,
        text_dim=arch.text_dim,
        freq_dim=arch.freq_dim,
        ffn_dim=arch.ffn_dim,
        num_layers=arch.num_layers,
        eps=arch.eps,
        image_dim=arch.image_dim if image else None,
        added_kv_proj_dim=arch.dim if image else None,
    ).eval()
    twin.load_state_dict(convert_wan_transformer_to_diffusers(dict(dit.state_dict())))
    return twin


def original_config(arch: WanArch) -> dict[str, object]:
    """The content of an original `config.json`, with the sizes that only a tiny model has to name."""
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim", "image_dim")
    sizes = {name: getattr(arch, name) for name in names}
    return {
        "_class_name": "WanModel",
        "model_type": arch.model_type,
        "eps": arch.eps,
        "text_len": arch.text_len,
        **sizes,
    }


def write_dit(dit: WanDiT, folder: Path, layout: str) -> Path:
    """Write the DiT into the model directory `folder`; returns `folder`."""
    if layout == "diffusers":
        diffusers_twin(dit).save_pretrained(folder / "transformer")
        pipeline = "WanImageToVideoPipeline" if dit.arch.model_type == "i2v" else "WanPipeline"
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "transformer_2": [None, None]}))
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dit.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(dit.arch)))
    return folder


def read_dit(files: WanFiles, dtype: torch.dtype = torch.float32) -> WanDiT:
    """The DiT that `files` found, in `dtype` but for its `fp32_names`; only tensors in one safetensors file."""
    with torch.device("meta"):
        dit = WanDiT(files.arch).eval()
    state = load_file(files.require("dit"))
    if files.layout == "diffusers":
        state = {keymap.to_original(name): tensor for name, tensor in state.items()}
    dit.load_state_dict(state, assign=True)
    return cast_dit(dit, dtype)


def cast_dit(dit: WanDiT, dtype: torch.dtype) -> WanDiT:
    for name, parameter in dit.named_parameters():
        if not any(fnmatch(name, glob) for glob in dit.fp32_names):
            parameter.data = parameter.data.to(dtype)
    return dit


def random_inputs(
    arch: WanArch, batch: int, grid: tuple[int, int, int], text_tokens: int = 512
) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    """Latents [B, C, t, h, w] on `grid`, time steps [B] and conditions of a model of `arch`."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    image = arch.model_type == "i2v"
    conditions = Conditions(
        text=random(batch, text_tokens, arch.text_dim),
        image=random(batch, 7, arch.image_dim) if image else None,
        latent=random(batch, arch.in_dim - arch.out_dim, *grid) if image else None,
    )
    timestep = torch.rand(batch, generator=generator) * 1000
    return random(batch, arch.out_dim, *grid), timestep, conditions


def run_twin(twin: nn.Module, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """diffusers' model on the inputs that `WanDiT` takes."""
    dtype = next(p.dtype for n, p in twin.named_parameters() if "to_q.weight" in n)
    parts = [latents] if conditions.latent is None else [latents, conditions.latent]
    image = None if conditions.image is None else conditions.image.to(dtype)
    out: torch.Tensor = twin(torch.cat(parts, 1).to(dtype), timestep, conditions.text.to(dtype), image).sample
    return out.float()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
