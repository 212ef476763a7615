"""diffusers' Wan transformer and pipeline, whose linears the other peers quantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.bench import work
from lightx2v.bench.peers.base import Choice, Peer
from lightx2v.foreign.build import is_fp32
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.keymap import to_original


def _leave(model: nn.Module, names: Sequence[str]) -> None:
    """Nothing is quantized."""


PEER = Peer("diffusers", "bfloat16", ("diffusers",), _leave, whole_model=True)


def empty_transformer(arch: WanArch) -> nn.Module:
    """diffusers' model of `arch` on meta, but for its rotary tables, which no checkpoint holds."""
    from diffusers import WanTransformer3DModel

    image = arch.model_type == "i2v"
    with torch.device("meta"):
        model: Any = WanTransformer3DModel(
            patch_size=arch.patch_size,
            num_attention_heads=arch.num_heads,
            attention_head_dim=arch.head_dim,
            in_channels=arch.in_dim,
            out_channels=arch.out_dim,
            text_dim=arch.text_dim,
            freq_dim=arch.freq_dim,
            ffn_dim=arch.ffn_dim,
            num_layers=arch.num_layers,
            cross_attn_norm=arch.cross_attn_norm,
            qk_norm="rms_norm_across_heads" if arch.qk_norm else None,
            eps=arch.eps,
            image_dim=arch.image_dim if image else None,
            added_kv_proj_dim=arch.dim if image else None,
        )
    model.rope = type(model.rope)(arch.head_dim, arch.patch_size, model.config.rope_max_seq_len)
    done: nn.Module = model
    return done


def quantize_blocks(model: Any, choice: Choice) -> None:
    """Quantize the linears of the blocks, the same that the engine quantizes, and compile the blocks if wanted."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks." in name]
    choice.quantize(model, names)
    if choice.compiled:
        model.compile_repeated_blocks(dynamic=False)


def random_transformer(arch: WanArch, choice: Choice, device: torch.device, seed: int) -> nn.Module:
    """The model of a peer with the random weights that `work.random_dit` has for the same `arch` and `seed`."""
    model = empty_transformer(arch)
    shapes = work.parameter_shapes(model)
    work.materialize(model, shapes, device, seed, rename=to_original, is_fp32=lambda name: is_fp32(model, name))
    quantize_blocks(model, choice)
    return model


def predict(model: Any, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
    """One forward pass: latents [1, C, t, h, w] and text [1, T, text_dim] to the predicted flow."""
    out: Tensor = model(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=text,
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0]
    return out
