"""Wan2.1: tasks, run defaults as its authors recommend them, and which layers are quantized."""

from __future__ import annotations

from lightx2v.models.spec import Defaults, FamilySpec

_SIZE = {"height": 480, "width": 832, "frames": 81, "fps": 16}

WAN = FamilySpec(
    name="wan2.1",
    tasks=("t2v", "i2v"),
    defaults={
        "t2v": Defaults(steps=50, shift=8.0, guidance=6.0, solver="unipc", **_SIZE),
        "i2v": Defaults(steps=40, shift=5.0, guidance=5.0, solver="unipc", **_SIZE),
    },
    quantized=("blocks.*.self_attn.*", "blocks.*.cross_attn.*", "blocks.*.ffn.*"),
    keep=("patch_embedding", "text_embedding.*", "time_embedding.*", "time_projection.*", "img_emb.*", "head.*"),
    vae_stride=(4, 8, 8),
    patch_size=(1, 2, 2),
    latent_channels=16,
    dit="lightx2v.models.wan.dit:WanDiT",
    layout="lightx2v.models.wan.layout:detect",
    keymap="lightx2v.models.wan.keymap",
    family="lightx2v.families.wan:WAN",
)
