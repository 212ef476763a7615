"""Settings of what is attached to a model from outside: attention, caches, offload, LoRA, VAE. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lightx2v.config.section import Count, Fraction, Name, Numbers, Path, PositiveFloat, PositiveInt, Section

CacheType = Literal[
    "none",
    "teacache",
    "magcache",
    "taylorseer",
    "custom",
    "fbcache",
    "dbcache",
    "adacache",
    "easycache",
    "fora",
    "pab",
    "deepcache",
]


class AttentionRule(Section):
    """One exception to `attention.type`."""

    type: Name = Field(description="Attention backend of what the rule covers.")
    steps: Name | None = Field(default=None, description="Steps as a slice, '0:4' or '4:'; null means all.")
    layers: Name | None = Field(
        default=None, description="Blocks as numbers and slices with commas, '0,3:7'; null means all."
    )
    part: Literal["self", "cross", "image"] | None = Field(
        default=None, description="Which attention of a block: to itself, to the text, or to an image; null means all."
    )


class AttentionConfig(Section):
    """The backend of every attention call."""

    type: str = Field(
        default="auto", description="Attention backend, by name; 'auto' takes the best that the device has."
    )
    cross: str | None = Field(default=None, description="Backend of the attention to the text; null: as type.")
    cross_image: str | None = Field(
        default=None, description="Backend of the attention to image tokens; null: as that to the text."
    )
    fallback: bool = Field(default=False, description="Permit another backend if the named one is missing.")
    rules: Annotated[tuple[AttentionRule, ...], Field(strict=False)] = Field(
        default=(), description="Exceptions by step, block and part, in order; the last match wins."
    )
    allow_download: bool = Field(
        default=False, description="Permit backends that the 'kernels' package downloads as ready-made kernels."
    )


class CacheConfig(Section):
    """Reuse of what the blocks made in an earlier step. An option that the method does not read is an error."""

    type: CacheType = Field(default="none", description="Method.")
    threshold: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="How much change is let pass before the blocks are computed again."
    )
    coefficients: Annotated[tuple[float | Numbers, ...], Field(strict=False)] | None = Field(
        default=None,
        description="TeaCache's polynomial, highest degree first; or two: with use_ret_steps, and without.",
    )
    use_ret_steps: bool | None = Field(
        default=None, description="TeaCache: measure the blocks' time embedding and compute the first steps."
    )
    ratios: Annotated[tuple[float | Numbers, ...], Field(strict=False)] | None = Field(
        default=None, description="MagCache's magnitude ratios, one a step; or two lists, with and without the prompt."
    )
    max_skip: PositiveInt | None = Field(default=None, description="Most steps in a row that are not computed.")
    retention: Fraction | None = Field(default=None, description="Share of the steps, at the start, always computed.")
    interval: PositiveInt | None = Field(default=None, description="Every so many steps the blocks are computed.")
    branch: Count | None = Field(
        default=None,
        description="DeepCache: the skip connection, from the outside, below which a UNet is not computed.",
    )
    order: Annotated[int, Field(ge=0, le=4)] | None = Field(default=None, description="Order of the Taylor series.")
    lite: bool | None = Field(
        default=None, description="TaylorSeer: extrapolate the model's output, and keep nothing of its blocks."
    )
    warmup: Count | None = Field(default=None, description="Steps at the start that are always computed.")
    first_blocks: PositiveInt | None = Field(default=None, description="Blocks that are always computed, at the front.")
    last_blocks: Count | None = Field(default=None, description="Blocks that are always computed, at the end.")
    max_cached: PositiveInt | None = Field(default=None, description="Most steps that are not computed, in all.")
    max_continuous: PositiveInt | None = Field(default=None, description="Most such steps in a row.")
    taylor: bool | None = Field(default=None, description="Extrapolate what is reused by a Taylor series.")
    window: Annotated[tuple[float, float], Field(strict=False)] | None = Field(
        default=None, description="Timesteps, of 0 to 1000, between which the method works."
    )
    codebook: Annotated[tuple[Annotated[tuple[float, int], Field(strict=False)], ...], Field(strict=False)] | None = (
        Field(default=None, description="AdaCache: rising changes, each with the steps to the next computed one.")
    )
    motion: bool | None = Field(default=None, description="AdaCache: compute more often where the frames differ much.")
    cfg_gate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Share of the steps, at the start, that run both branches of classifier-free guidance.",
    )
    cfg_interval: PositiveInt | None = Field(
        default=None, description="After those steps, both branches run every so many steps; null: never again."
    )
    cfg_separate: bool | None = Field(
        default=None,
        description="Each branch of guidance decides for itself, as published; null or false: both at the same steps.",
    )
    store: Literal["compute", "fp8"] = Field(default="compute", description="What is kept is held in this dtype.")
    file: Path | None = Field(default=None, description="What `lightx2v calibrate --cache` wrote for this model.")


class OffloadConfig(Section):
    """Weights that are kept off the device until they are needed."""

    enabled: bool | Literal["auto"] = Field(
        default=False, description="Offload the DiT; 'auto' takes the mildest form with which the plan fits."
    )
    granularity: Literal["model", "block", "phase"] = Field(
        default="block", description="What is moved at a time: the whole model, a block, or a part of a block."
    )
    ratio: Fraction = Field(default=1.0, description="Share of the blocks that are offloaded.")
    lazy_load: bool = Field(default=False, description="Keep the blocks on disk rather than in host memory.")
    workers: PositiveInt = Field(default=2, description="Threads that read from disk.")
    max_memory_gb: PositiveFloat | None = Field(
        default=None, description="Host memory, in GiB, for blocks that were read ahead; null: two blocks."
    )
    text_encoder: bool = Field(default=False, description="Keep the text encoders off the device until their use.")
    image_encoder: bool = Field(default=False, description="Keep the image encoder off the device until its use.")
    vae: bool = Field(default=False, description="Keep the VAE off the device until its use.")


class LoraConfig(Section):
    """One LoRA."""

    path: Path = Field(description="The .safetensors file.")
    strength: float = Field(default=1.0, description="What its change of the weights is multiplied by.")
    name: Name | None = Field(default=None, description="Its name for switch_lora; the file's own when null.")
    alpha: PositiveFloat | None = Field(default=None, description="Its alpha where the file gives none.")


class VaeConfig(Section):
    """How latents become pixels."""

    path: Path | None = Field(default=None, description="Weights of the VAE in place of the model's own; a LightVAE.")
    tiling: bool = Field(default=False, description="Decode in overlapping tiles, with less memory.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="What the VAE computes in.")
    channels_last: bool = Field(
        default=False, description="Hold the VAE's convolutions with the channels last, as GPUs read them."
    )
    compile: bool = Field(default=False, description="Compile the VAE's decoder with torch.compile.")
    tae: bool = Field(default=False, description="Decode with a tiny autoencoder.")
    tae_path: Path | None = Field(
        default=None, description="Weights of the tiny autoencoder; null: the file of the model's directory."
    )
    tae_scaled: bool | None = Field(
        default=None, description="Whether the tiny autoencoder takes normalized latents; null: by the file's name."
    )
