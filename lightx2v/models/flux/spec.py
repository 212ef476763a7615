"""FLUX.1: tasks, run defaults as its authors recommend them, and which layers are quantized."""

from __future__ import annotations

from dataclasses import replace

from lightx2v.models.spec import Defaults, FamilySpec

_DEV = Defaults(steps=28, shift=None, guidance=3.5, solver="euler", height=1024, width=1024, frames=1, fps=1)

FLUX = FamilySpec(
    name="flux",
    tasks=("t2i", "i2i"),
    defaults={"t2i": _DEV, "i2i": replace(_DEV, strength=0.6)},
    variants={
        "schnell": {"steps": 4},
        "kontext": {"guidance": 2.5, "strength": None},
    },
    quantized=("double_blocks.*", "single_blocks.*"),
    keep=("img_in", "txt_in", "time_in.*", "vector_in.*", "guidance_in.*", "final_layer.*"),
    vae_stride=(1, 8, 8),
    patch_size=(1, 2, 2),
    latent_channels=16,
    dit="lightx2v.models.flux.dit:FluxDiT",
    layout="lightx2v.models.flux.layout:detect",
    keymap="lightx2v.models.flux.keymap",
    family="lightx2v.families.flux:FLUX",
    translate="lightx2v.models.flux.checkpoint:translate",
    embedded_guidance=True,
)
