"""Tiny FLUX.1 models with random weights, written to disk in diffusers' layout, in the original one, and in ComfyUI's.

The original names and pieces are spelled out here again, apart from the package's tables, so that a wrong table fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.components import empty_dit, fill_dit
from lightx2v.models.base import Conditions
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.dit import FluxDiT
from lightx2v.models.flux.spec import FLUX

Layout = Literal["diffusers", "original", "comfyui"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "original", "comfyui")
PREFIX = "model.diffusion_model."
CHANNELS = 16


def tiny_transformer(guidance: bool = True, seed: int = 0) -> FluxTransformer2DModel:
    """diffusers' model, every parameter of it random, norms and biases too, so that none can be left out unnoticed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=64,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 14, 14),
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.02))
    return model


def original_state(model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """Its weights as `flux1-dev.safetensors` has them."""
    state: dict[str, Tensor] = {}

    def add(name: str, *layers: nn.Module) -> None:
        for leaf, first in layers[0].named_parameters():
            parts = [first, *(layer.get_parameter(leaf) for layer in layers[1:])]
            state[f"{name}.{leaf}"] = torch.cat([part.detach() for part in parts]).clone()

    def add_norms(prefix: str, query: nn.Module, key: nn.Module) -> None:
        for name, norm in (("query_norm", query), ("key_norm", key)):
            state[f"{prefix}.{name}.scale"] = norm.get_parameter("weight").detach().clone()

    add("img_in", model.x_embedder)
    add("txt_in", model.context_embedder)
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    for name, other in embedders.items():
        if embedder := getattr(model.time_text_embed, other, None):
            add(f"{name}.in_layer", embedder.linear_1)
            add(f"{name}.out_layer", embedder.linear_2)
    for index, block in enumerate(model.transformer_blocks):
        at, attn = f"double_blocks.{index}", block.attn
        add(f"{at}.img_mod.lin", block.norm1.linear)
        add(f"{at}.txt_mod.lin", block.norm1_context.linear)
        add(f"{at}.img_attn.qkv", attn.to_q, attn.to_k, attn.to_v)
        add(f"{at}.txt_attn.qkv", attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        add_norms(f"{at}.img_attn.norm", attn.norm_q, attn.norm_k)
        add_norms(f"{at}.txt_attn.norm", attn.norm_added_q, attn.norm_added_k)
        add(f"{at}.img_attn.proj", attn.to_out[0])
        add(f"{at}.txt_attn.proj", attn.to_add_out)
        for name, feed_forward in (("img_mlp", block.ff), ("txt_mlp", block.ff_context)):
            add(f"{at}.{name}.0", feed_forward.net[0].proj)
            add(f"{at}.{name}.2", feed_forward.net[2])
    for index, block in enumerate(model.single_transformer_blocks):
        at, attn = f"single_blocks.{index}", block.attn
        add(f"{at}.modulation.lin", block.norm.linear)
        add(f"{at}.linear1", attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        add(f"{at}.linear2", block.proj_out)
        add_norms(f"{at}.norm", attn.norm_q, attn.norm_k)
    add("final_layer.linear", model.proj_out)
    for leaf, tensor in model.norm_out.linear.named_parameters():
        scale, shift = tensor.detach().chunk(2)
        state[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    return state


def write_dit(model: FluxTransformer2DModel, folder: Path, layout: Layout, name: str = "flux1-dev.safetensors") -> Path:
    """Write the weights into the model directory `folder`; returns what to open: a file, or diffusers' folder."""
    if layout == "diffusers":
        # In several files, so that the parts of one layer may lie apart.
        model.save_pretrained(folder / "transformer", max_shard_size="400KB")
        return folder / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    state = original_state(model)
    if layout == "comfyui":
        state = {f"{PREFIX}{key}": tensor for key, tensor in state.items()}
        state["vae.encoder.conv_in.weight"] = torch.zeros(2, 3)
    save_file(state, folder / name)
    return folder / name


def read_dit(path: Path, arch: FluxArch, dtype: torch.dtype = torch.float32) -> FluxDiT:
    """The DiT in a checkpoint of any layout, through the engine's own loader."""
    dit = empty_dit(FLUX, arch, {}, dtype, auto_quant=False)
    tensors = ((FLUX.original_name(name), tensor) for name, tensor in FLUX.open(path).stream())
    fill_dit(dit, tensors, torch.device("cpu"), dtype, str(path))
    assert isinstance(dit, FluxDiT)
    return dit.eval()


def tiny_dit(guidance: bool = True, seed: int = 0) -> FluxDiT:
    """A DiT with the weights of `tiny_transformer`."""
    state = original_state(tiny_transformer(guidance, seed))
    dit = FluxDiT(FluxArch.from_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, "tiny")).eval()
    dit.load_state_dict(state)
    return dit


def random_inputs(
    arch: FluxArch, batch: int, size: tuple[int, int], reference: tuple[int, int] | None = None, text_tokens: int = 7
) -> tuple[Tensor, Tensor, Conditions]:
    """Latents [B, C, 1, h, w], time steps [B] and conditions; sizes in tokens, `reference` that of a second image."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def image(size: tuple[int, int]) -> Tensor:
        return random(batch, CHANNELS, 1, 2 * size[0], 2 * size[1])

    conditions = Conditions(
        text=random(batch, text_tokens, arch.text_dim),
        pooled=random(batch, arch.pooled_dim),
        guidance=3.5,
        latent=None if reference is None else image(reference),
    )
    return image(size), torch.rand(batch, generator=generator) * 1000, conditions


def run_twin(model: FluxTransformer2DModel, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """diffusers' model on the inputs that `FluxDiT` takes, packed as its pipelines do."""
    from diffusers import FluxKontextPipeline as Pipeline

    images = [latents] if conditions.latent is None else [latents, conditions.latent]
    packed, ids = [], []
    for number, image in enumerate(images):
        batch, channels, _, height, width = image.shape
        packed.append(Pipeline._pack_latents(image[:, :, 0], batch, channels, height, width))
        places = Pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, image.device, torch.float32)
        places[..., 0] = number
        ids.append(places)
    assert conditions.pooled is not None and conditions.guidance is not None
    dtype = model.dtype
    out = model(
        hidden_states=torch.cat(packed, dim=1).to(dtype),
        encoder_hidden_states=conditions.text.to(dtype),
        pooled_projections=conditions.pooled.to(dtype),
        timestep=timestep / 1000,
        img_ids=torch.cat(ids),
        txt_ids=torch.zeros(conditions.text.shape[1], 3),
        guidance=torch.full_like(timestep, conditions.guidance) if model.config.guidance_embeds else None,
    ).sample
    height, width = latents.shape[3:]
    kept = out[:, : packed[0].shape[1]]
    return Pipeline._unpack_latents(kept, 8 * height, 8 * width, 8)[:, :, None].float()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def write_index(folder: Path, pipeline: str = "FluxPipeline") -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
