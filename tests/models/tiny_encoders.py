"""Tiny encoders and a tiny VAE with random weights, written to disk in Wan's original layout and in diffusers'.

The original names are spelled out here again, apart from the package's own tables, so that a wrong table fails.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


def randomize(module: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Every parameter random, norms and biases too, so that none can be left out or swapped unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name))
    module.eval()


def tiny_tokenizer() -> T5Tokenizer:
    """Unigram tokens, a letter or a few whole words each."""
    words = ["▁a", "▁red", "▁green", "▁circle", "▁square", "▁on", "▁black", "▁background", "▁moves", "▁left", "▁right"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,&<>'"]
    return T5Tokenizer(vocab=[*special, *((word, -2.0) for word in words), *letters], extra_ids=0)


def tiny_t5(seed: int = 0, scale: float = 0.3) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=40, num_layers=2, num_heads=3)
    model = UMT5EncoderModel(config)
    randomize(model, seed, scale)
    return model


def t5_original(model: UMT5EncoderModel) -> dict[str, Tensor]:
    state = {"token_embedding.weight": model.shared.weight, "norm.weight": model.encoder.final_layer_norm.weight}
    for i, block in enumerate(model.encoder.block):
        attention, feed_forward = block.layer[0], block.layer[1]
        layers = {
            "norm1": attention.layer_norm,
            "attn.q": attention.SelfAttention.q,
            "attn.k": attention.SelfAttention.k,
            "attn.v": attention.SelfAttention.v,
            "attn.o": attention.SelfAttention.o,
            "norm2": feed_forward.layer_norm,
            "ffn.gate.0": feed_forward.DenseReluDense.wi_0,
            "ffn.fc1": feed_forward.DenseReluDense.wi_1,
            "ffn.fc2": feed_forward.DenseReluDense.wo,
            "pos_embedding.embedding": attention.SelfAttention.relative_attention_bias,
        }
        state |= {f"blocks.{i}.{name}.weight": layer.weight for name, layer in layers.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def write_t5(model: UMT5EncoderModel, folder: Path, layout: str) -> tuple[Path, Path]:
    """Write encoder and tokenizer; returns their two paths."""
    if layout == "diffusers":
        model.save_pretrained(folder / "text_encoder")
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        return folder / "text_encoder", folder / "tokenizer"
    weights = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(t5_original(model), weights)
    tiny_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return weights, folder / "google" / "umt5-xxl"


def tiny_clip(width: int = 160, heads: int = 2, seed: int = 0) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=heads,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    model = CLIPVisionModel(config)
    randomize(model, seed, scale=0.1)
    return model


def clip_original(model: CLIPVisionModel) -> dict[str, Tensor]:
    """With tensors of the text tower and the projection, as the original file has them."""
    embeddings, state = model.embeddings, {}
    state["log_scale"] = torch.zeros(())
    state["visual.cls_embedding"] = embeddings.class_embedding[None, None]
    state["visual.pos_embedding"] = embeddings.position_embedding.weight[None]
    state["visual.patch_embedding.weight"] = embeddings.patch_embedding.weight
    state["visual.head"] = torch.zeros(model.config.hidden_size, 8)
    state["textual.token_embedding.weight"] = torch.zeros(7, 8)
    norms = {"visual.pre_norm": model.pre_layrnorm, "visual.post_norm": model.post_layernorm}
    for i, layer in enumerate(model.encoder.layers):
        attention, prefix = layer.self_attn, f"visual.transformer.{i}"
        for leaf in ("weight", "bias"):
            parts = [getattr(part, leaf) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            state[f"{prefix}.attn.to_qkv.{leaf}"] = torch.cat(parts)
        norms |= {f"{prefix}.norm1": layer.layer_norm1, f"{prefix}.norm2": layer.layer_norm2}
        norms |= {f"{prefix}.attn.proj": attention.out_proj}
        norms |= {f"{prefix}.mlp.0": layer.mlp.fc1, f"{prefix}.mlp.2": layer.mlp.fc2}
    for name, module in norms.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def write_clip(model: CLIPVisionModel, folder: Path, layout: str) -> tuple[Path, Path | None]:
    """Write the image encoder and, in the diffusers layout, its processor; returns their two paths."""
    if layout == "diffusers":
        size = model.config.image_size
        model.save_pretrained(folder / "image_encoder")
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        processor.save_pretrained(folder / "image_processor")
        return folder / "image_encoder", folder / "image_processor"
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(clip_original(model), weights)
    return weights, None


def tiny_vae(num_res_blocks: int = 2, base_dim: int = 4, seed: int = 0) -> AutoencoderKLWan:
    model = AutoencoderKLWan(base_dim=base_dim, num_res_blocks=num_res_blocks)
    randomize(model, seed, scale=0.1)
    return model


def vae_original(model: AutoencoderKLWan) -> dict[str, Tensor]:
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    residual["conv_shortcut"] = "shortcut"
    state: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, renamed: dict[str, str] | None = None) -> None:
        for key, tensor in module.state_dict().items():
            layer, _, leaf = key.rpartition(".")
            inner = f"{(renamed or {}).get(layer, layer)}.{leaf}" if layer else leaf
            state[f"{name}.{inner}"] = tensor.clone()

    add("conv1", model.quant_conv)
    add("conv2", model.post_quant_conv)
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        add(f"{name}.conv1", part.conv_in)
        add(f"{name}.middle.0", part.mid_block.resnets[0], residual)
        add(f"{name}.middle.1", part.mid_block.attentions[0])
        add(f"{name}.middle.2", part.mid_block.resnets[1], residual)
        add(f"{name}.head.0", part.norm_out)
        add(f"{name}.head.2", part.conv_out)
    for i, layer in enumerate(model.encoder.down_blocks):
        add(f"encoder.downsamples.{i}", layer, residual)
    layers = [layer for block in model.decoder.up_blocks for layer in (*block.resnets, *(block.upsamplers or ()))]
    for i, layer in enumerate(layers):
        add(f"decoder.upsamples.{i}", layer, residual)
    return state


def write_vae(model: AutoencoderKLWan, folder: Path, layout: str) -> Path:
    if layout == "diffusers":
        model.save_pretrained(folder / "vae")
        return folder / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vae_original(model), folder / "Wan2.1_VAE.pth")
    return folder / "Wan2.1_VAE.pth"
