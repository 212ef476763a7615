"""The tiny transformers of diffusers that the scripts beside this one quantize, and what they store of them.

Run a script with the Python of an environment that has diffusers and the package it names, from the repository's root:
`python -m tests.data.interop.make_quanto`. A variant is a folder as users write it, and `<variant>.example.safetensors`
beside it: inputs, the output of the package's own model on a CPU, and rows of what the package takes its weights for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).parent
ROWS = 4
TEXT_TOKENS = 512
TIMESTEP = 1.0
"""A small one: the sines of large angles, which diffusers computes in float32, differ enough to tip codes of inputs."""
WATCHED = {
    "wan": ("blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "condition_embedder.time_proj", "proj_out"),
    "flux": ("transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.0.proj_out"),
}
"""Layers of which rows are stored: of the weight as the package dequantizes it, of an input and of the result."""


def _randomize(model: nn.Module) -> None:
    """Every parameter is random, norms and biases too, so that none can be left out unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.02))


def wan(ffn_dim: int = 128, width: int = 64) -> WanTransformer3DModel:
    """One block of `width`: codes of 8 bits make a small file only at 32."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=ffn_dim,
        num_layers=1,
    )
    _randomize(model)
    return model.eval()


def flux(width: int = 64) -> FluxTransformer2DModel:
    """One double-stream and one single-stream block."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(width // 2 - 12, 6, 6),
    )
    _randomize(model)
    return model.eval()


def _wan_example(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 1, 6, 8, generator=generator)
    text = torch.randn(1, 8, 16, generator=generator)
    timestep = torch.tensor([TIMESTEP])
    padded = F.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))  # as Wan's pipeline pads
    output = model(latents.to(dtype), timestep, padded.to(dtype)).sample
    return {"latents": latents, "text": text, "timestep": timestep, "output": output.float()}


def _flux_example(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 1, 6, 8, generator=generator)
    text, pooled = torch.randn(1, 8, 24, generator=generator), torch.randn(1, 16, generator=generator)
    timestep, guidance = torch.tensor([TIMESTEP]), torch.tensor([3.5])
    output = model(
        hidden_states=FluxPipeline._pack_latents(latents[:, :, 0], 1, 4, 6, 8).to(dtype),
        encoder_hidden_states=text.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=timestep / 1000,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 3, 4, latents.device, torch.float32),
        txt_ids=torch.zeros(8, 3),
        guidance=guidance,
    ).sample
    unpacked = FluxPipeline._unpack_latents(output, 48, 64, 8)[:, :, None].float()
    return {"latents": latents, "text": text, "pooled": pooled, "timestep": timestep, "output": unpacked}


def _watch(name: str, seen: dict[str, Tensor]) -> Callable[..., None]:
    def watch(layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        seen[f"{name}.input"] = given[0].flatten(0, -2)[:ROWS].float().clone()
        seen[f"{name}.result"] = result.flatten(0, -2)[:ROWS].float().clone()

    return watch


@torch.no_grad()
def write_example(
    folder: Path,
    model: nn.Module,
    weight_of: Callable[[Any], Tensor],
    packages: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Store what `model`, which computes in `dtype`, gives; `weight_of` is the float weight of one of its layers."""
    kind = "wan" if isinstance(model, WanTransformer3DModel) else "flux"
    seen: dict[str, Tensor] = {}
    hooks = [model.get_submodule(name).register_forward_hook(_watch(name, seen)) for name in WATCHED[kind]]
    tensors = (_wan_example if kind == "wan" else _flux_example)(model, dtype) | seen
    for hook in hooks:
        hook.remove()
    for name in WATCHED[kind]:
        tensors[f"{name}.weight"] = weight_of(model.get_submodule(name))[:ROWS].float()
    told = {name: version(name) for name in ("torch", "diffusers", *packages)}
    path = folder.with_name(f"{folder.name}.example.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, told)
    print(f"{folder.relative_to(ROOT)}: output of norm {float(tensors['output'].norm()):.6f}")


def fresh(package: str, variant: str) -> Path:
    """An empty folder for a variant."""
    folder = ROOT / package / variant
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_state(folder: Path, model: Any, state: Mapping[str, Tensor]) -> None:
    """A state dict beside diffusers' config.json of the model."""
    model.save_config(folder)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "diffusion_pytorch_model.safetensors")


@contextmanager
def saved(model: Any) -> Iterator[str]:
    """The folder of the model that save_pretrained wrote: a relative one, since config files keep its name."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            model.save_pretrained("tiny")
            yield "tiny"
        finally:
            os.chdir(before)


def exchange_linears(model: nn.Module, made: Callable[[nn.Linear], nn.Module], keep: tuple[str, ...] = ()) -> None:
    """Replace every linear layer, but for those below a module in `keep`, as diffusers' quantizers do."""
    for name, child in model.named_children():
        if name in keep:
            continue
        if isinstance(child, nn.Linear):
            setattr(model, name, made(child))
        else:
            exchange_linears(child, made, keep)
