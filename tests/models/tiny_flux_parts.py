"""Tiny models that FLUX.1 has beside its DiT, with random weights, on disk in diffusers' layout and as single files."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tests.models.tiny_encoders import randomize, tiny_tokenizer

TEXT_DIM, POOLED_DIM = 24, 64
CLIP_POSITIONS = 16
WORDS = ("red", "green", "circle", "square", "black", "on")


def tiny_t5_tokenizer() -> T5Tokenizer:
    return tiny_tokenizer()


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """Letters, and a few whole words; the end has the largest number, as in CLIP's own."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list(",.")
    merges: list[tuple[str, str]] = []
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[-2], parts[-1])
            if merge not in merges:
                merges.append(merge)
                vocabulary.append("".join(merge))
            parts = [*parts[:-2], "".join(merge)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=CLIP_POSITIONS)


def tiny_t5(seed: int = 0, scale: float = 0.3) -> T5EncoderModel:
    config = T5Config(
        vocab_size=64, d_model=TEXT_DIM, d_kv=16, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config)
    randomize(model, seed, scale)
    return model


def tiny_clip_text(seed: int = 0) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tiny_clip_tokenizer()),
        hidden_size=POOLED_DIM,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=CLIP_POSITIONS,
        eos_token_id=2,
    )
    model = CLIPTextModel(config)
    randomize(model, seed)
    return model


def tiny_vae(depth: int = 2, seed: int = 0) -> AutoencoderKL:
    widths = [32, 32, 64, 96]
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=depth,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=1024,
    )
    randomize(model, seed, scale=0.05)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(0.3)  # so that few pixels are beyond black and white
    return model


def vae_original(model: AutoencoderKL) -> dict[str, Tensor]:
    """Its weights as `ae.safetensors` has them."""
    state: dict[str, Tensor] = {}
    residual = {"conv_shortcut": "nin_shortcut"}

    def add(name: str, module: torch.nn.Module) -> None:
        for key, tensor in module.state_dict().items():
            layer, _, leaf = key.rpartition(".")
            state[f"{name}.{residual.get(layer, layer)}.{leaf}" if layer else f"{name}.{leaf}"] = tensor.clone()

    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        add(f"{name}.conv_in", part.conv_in)
        add(f"{name}.norm_out", part.conv_norm_out)
        add(f"{name}.conv_out", part.conv_out)
        add(f"{name}.mid.block_1", part.mid_block.resnets[0])
        add(f"{name}.mid.block_2", part.mid_block.resnets[1])
        attention = part.mid_block.attentions[0]
        add(f"{name}.mid.attn_1.norm", attention.group_norm)
        projections = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}
        for own, layer in projections.items():
            state[f"{name}.mid.attn_1.{own}.weight"] = layer.weight.detach().clone()[:, :, None, None]
            state[f"{name}.mid.attn_1.{own}.bias"] = layer.bias.detach().clone()
    levels = len(model.config.block_out_channels)
    for index, block in enumerate(model.encoder.down_blocks):
        for number, resnet in enumerate(block.resnets):
            add(f"encoder.down.{index}.block.{number}", resnet)
        if block.downsamplers is not None:
            add(f"encoder.down.{index}.downsample.conv", block.downsamplers[0].conv)
    for index, block in enumerate(model.decoder.up_blocks):
        level = levels - 1 - index
        for number, resnet in enumerate(block.resnets):
            add(f"decoder.up.{level}.block.{number}", resnet)
        if block.upsamplers is not None:
            add(f"decoder.up.{level}.upsample.conv", block.upsamplers[0].conv)
    return state


def clip_text_original(model: CLIPTextModel) -> dict[str, Tensor]:
    """Its weights as `clip_l.safetensors` has them."""
    state = {f"text_model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    extra = {"text_projection.weight": torch.zeros(8, POOLED_DIM), "logit_scale": torch.zeros(())}
    return {**state, **extra, "text_model.embeddings.position_ids": torch.arange(CLIP_POSITIONS)[None]}


def t5_original(model: T5EncoderModel) -> dict[str, Tensor]:
    """Its weights as `t5xxl_fp16.safetensors` has them, with the embedding twice."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {**state, "encoder.embed_tokens.weight": state["shared.weight"].clone()}


def write_t5(model: T5EncoderModel, folder: Path, layout: str) -> tuple[Path, Path]:
    """Write encoder and tokenizer; returns their two paths."""
    tiny_t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    if layout == "diffusers":
        model.save_pretrained(folder / "text_encoder_2")
        return folder / "text_encoder_2", folder / "tokenizer_2"
    save_file(t5_original(model), folder / "t5xxl_fp16.safetensors")
    return folder / "t5xxl_fp16.safetensors", folder / "tokenizer_2"


def write_clip_text(model: CLIPTextModel, folder: Path, layout: str) -> tuple[Path, Path]:
    """Write encoder and tokenizer; returns their two paths."""
    tiny_clip_tokenizer().save_pretrained(folder / "tokenizer")
    if layout == "diffusers":
        model.save_pretrained(folder / "text_encoder")
        return folder / "text_encoder", folder / "tokenizer"
    save_file(clip_text_original(model), folder / "clip_l.safetensors")
    return folder / "clip_l.safetensors", folder / "tokenizer"


def write_vae(model: AutoencoderKL, folder: Path, layout: str) -> Path:
    if layout == "diffusers":
        model.save_pretrained(folder / "vae")
        return folder / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vae_original(model), folder / "ae.safetensors")
    return folder / "ae.safetensors"
