"""What a plan needs at its peak, estimated from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightx2v.errors import UserError
from lightx2v.platform import DeviceInfo
from lightx2v.units import human_bytes

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the device in each stage: its own working memory and the weights that are resident then."""

    stages: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.stages.values())


def estimate(
    weights: Mapping[str, int],
    kinds: Mapping[str, str],
    *,
    tokens: int,
    dim: int,
    ffn_dim: int,
    dtype_bytes: int,
    frames: int,
    frame_pixels: int,
    vae_dim: int,
    unload: bool,
    idle: Mapping[str, int] | None = None,
    once: int = 0,
    remembered: int = 0,
    ffn_rows: int | None = None,
    vae_bytes: int = 4,
) -> MemoryEstimate:
    """Peak bytes of the stages text, image, prepare, denoise and decode.

    `kinds` says what each part with weights is: "dit", "text_encoder", "image_encoder" or "vae". `weights` are the
    bytes of each while it is in use, `idle` what stays of it otherwise, for those of which that is less. `once` are the
    bytes that the DiT gives up for the loop, `tokens` is the length of its sequence, `remembered` what is kept from
    step to step, `ffn_rows` the rows that a feed-forward takes at a time (None: all), `frame_pixels` = height * width,
    `vae_dim` the VAE's base channels, `vae_bytes` those of a number in it. The DiT holds, besides its weights, about
    eight [L, D] tensors in the compute dtype, three in float32 and two [L, ffn]; the VAE about six feature maps of four
    frames at full size, and the frames twice, in float32.
    """
    wide = min(tokens, ffn_rows or tokens) * ffn_dim * 2 * dtype_bytes
    denoise = tokens * dim * (8 * dtype_bytes + 3 * 4) + wide + remembered
    decode = 6 * 4 * frame_pixels * vae_dim * vae_bytes + frames * frame_pixels * 3 * 4 * 2
    there = set(kinds.values())
    work = {"text": 0, "image": decode, "prepare": once, "denoise": denoise, "decode": decode}
    needs = {
        "text": ("text_encoder",),
        "image": ("image_encoder", "vae"),
        "prepare": ("dit",),
        "denoise": ("dit",),
        "decode": ("vae",),
    }
    kept = dict.fromkeys(weights, 0) if unload else {**weights, **(idle or {})}
    return MemoryEstimate(
        {
            stage: work[stage]
            + sum(size if kinds[name] in needs[stage] else kept[name] for name, size in weights.items())
            for stage in needs
            if stage != "image" or "image_encoder" in there
        }
    )


def check_fits(estimate: MemoryEstimate, device: DeviceInfo, limit_gb: float | None) -> None:
    """Refuse, before anything is loaded, a plan that needs more than `limit_gb` or than the device has free."""
    available = int(limit_gb * GIB) if limit_gb is not None else device.free_memory
    if estimate.peak <= available:
        return
    stage = max(estimate.stages, key=lambda name: estimate.stages[name])
    limit = "is max_memory_gb" if limit_gb is not None else f"is free on {device.name}"
    raise UserError(
        "memory",
        f"the plan needs about {human_bytes(estimate.peak)} at its peak ({stage}); {human_bytes(available)} {limit}",
        do="set unload_modules, a quantized mm_type, a smaller video or fewer frames (see lightx2v explain)",
    )
