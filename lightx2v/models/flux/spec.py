"""FLUX.1: tasks, run defaults as its authors recommend them, and which layers are quantized."""

from __future__ import annotations

from dataclasses import replace

from lightx2v.models.fold import Foldable
from lightx2v.models.spec import Defaults, FamilySpec

_DEV = Defaults(steps=28, shift=None, guidance=3.5, solver="euler", height=1024, width=1024, frames=1, fps=1)

_FOLDABLE = (
    *(
        Foldable("modulation", (f"double_blocks.*.{of}_{layer}",), (f"double_blocks.*.{of}_mod.lin",), shift, scale)
        for of in ("img", "txt")
        for layer, shift, scale in (("attn.qkv", 0, 1), ("mlp.0", 3, 4))
    ),
    Foldable("modulation", ("single_blocks.*.linear1",), ("single_blocks.*.modulation.lin",), 0, 1),
    Foldable(
        "rows",
        ("double_blocks.*.img_attn.proj", "double_blocks.*.txt_attn.proj"),
        ("double_blocks.*.img_attn.qkv", "double_blocks.*.txt_attn.qkv"),
        chunk=2,
    ),
)
"""One attention mixes the values of both streams, whose projections afterwards share a multiplier therefore."""

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
    sensitive=("*_mlp.2", "*.linear2", "*_mod.lin", "*.modulation.lin", "double_blocks.0.*"),
    vae_stride=(1, 8, 8),
    patch_size=(1, 2, 2),
    latent_channels=16,
    dit="lightx2v.models.flux.dit:FluxDiT",
    layout="lightx2v.models.flux.layout:detect",
    keymap="lightx2v.models.flux.keymap",
    family="lightx2v.families.flux:FLUX",
    translate="lightx2v.models.flux.checkpoint:translate",
    embedded_guidance=True,
    foldable=_FOLDABLE,
)
