"""Tiny diffusers pipelines with random weights, saved to disk as their authors save theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from tests.models.tiny_encoders import tiny_tokenizer

PROMPT, NEGATIVE, SEED, STEPS = "a red circle on a black background", "left", 7, 5


def randomize(module: nn.Module, seed: int) -> Any:
    """`module` with every parameter random, norms and biases too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.1 if parameter.ndim < 2 else parameter.shape[1:].numel() ** -0.5
            fresh = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(fresh + 1 if parameter.ndim == 1 and bool((parameter == 1).all()) else fresh)
    return module.eval()


def clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=48)


def clip_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=48,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def tiny_t5(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=64, d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return randomize(T5EncoderModel(config), 3)


def tiny_vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        **options,
    )
    return randomize(model, 4)


def tiny_unet() -> UNet2DConditionModel:
    """SDXL's shape: no attention outside, added text and time embedding, linear projections, three levels."""
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        norm_num_groups=8,
    )
    return randomize(model, 5)


def write_sdxl(folder: Path) -> Path:
    """A UNet with two CLIP encoders, 32x32 pixels by default."""
    StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=False),
        text_encoder=randomize(CLIPTextModel(clip_config(32)), 1),
        text_encoder_2=randomize(CLIPTextModelWithProjection(clip_config(32)), 2),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=tiny_unet(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
    ).save_pretrained(folder)
    return folder


def write_pixart(folder: Path) -> Path:
    """A transformer with masked text, 16x16 pixels by default."""
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=3,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=32,
        in_channels=4,
        out_channels=8,
    )
    PixArtAlphaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_t5(32),
        vae=tiny_vae(),
        transformer=randomize(transformer, 6),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder


def write_sd3(folder: Path) -> Path:
    """A joint transformer with three text encoders, 32x32 pixels by default."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=randomize(transformer, 7),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=randomize(CLIPTextModelWithProjection(clip_config(32)), 1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=randomize(CLIPTextModelWithProjection(clip_config(32)), 2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=tiny_t5(64),
        tokenizer_3=tiny_tokenizer(),
    ).save_pretrained(folder)
    return folder


def write_cogvideox(folder: Path) -> Path:
    """A video transformer with rotary positions, 9 frames of 16x16 pixels by default."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=24,
        use_rotary_positional_embeddings=True,
    )
    vae: Any = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    vae = randomize(vae, 8)
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight.mul_(0.1)  # or all pixels are black or white
    CogVideoXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_t5(32),
        vae=vae,
        transformer=randomize(transformer, 9),
        scheduler=CogVideoXDDIMScheduler(),
    ).save_pretrained(folder)
    return folder


WRITERS = {"sdxl": write_sdxl, "pixart": write_pixart, "sd3": write_sd3, "cogvideox": write_cogvideox}

EXTRA: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False},
    "cogvideox": {"max_sequence_length": 24},
}
"""What pipelines of this size must be called with besides: no table of common sizes, short texts."""


def settings(name: str, folder: Path, **overrides: Any) -> dict[str, Any]:
    """The configuration of a run of the pipeline `name` in `folder`, on the CPU in float32."""
    own: dict[str, Any] = {"pixart": {"pipeline_args": EXTRA["pixart"]}, "cogvideox": {"text_len": 24}}.get(name, {})
    return {
        "model_cls": "diffusers",
        "task": "t2v" if name == "cogvideox" else "t2i",
        "model_path": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "seed": SEED,
        "sampling.steps": STEPS,
        **own,
        **overrides,
    }


def diffusers_frames(pipe: Any, name: str, **overrides: Any) -> np.ndarray:
    """What the pipeline `name` of diffusers makes by itself of the same request, uint8 [T, H, W, 3]."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = (
                parameter.data.clone()
            )  # mapped files lie at odd addresses, where some sums round otherwise
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(SEED),
        "output_type": "np",
        **EXTRA.get(name, {}),
        **overrides,
    }
    with torch.no_grad():
        result = pipe(**arguments)
    pixels = result.frames[0] if hasattr(result, "frames") else result.images[:1]
    return (pixels * 255).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-10, float(np.mean((a.astype(float) - b.astype(float)) ** 2)))))
