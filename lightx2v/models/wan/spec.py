"""Wan2.1: tasks, run defaults as its authors recommend them, and which layers are quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightx2v.models.fold import Foldable
from lightx2v.models.spec import Defaults, FamilySpec

_SIZE: dict[str, Any] = {"height": 480, "width": 832, "frames": 81, "fps": 16}

_FOLDABLE = (
    Foldable("norm", ("blocks.*.cross_attn.q",), ("blocks.*.norm3",)),
    Foldable("rows", ("blocks.*.self_attn.o",), ("blocks.*.self_attn.v",)),
    Foldable("rows", ("blocks.*.cross_attn.o",), ("blocks.*.cross_attn.v", "blocks.*.cross_attn.v_img")),
    Foldable("rows", ("blocks.*.cross_attn.o",), ("blocks.*.cross_attn.v",)),
)
"""Not self-attention and feed-forward: the norms before them have no weights, and all blocks share the modulation."""

WAN = FamilySpec(
    name="wan2.1",
    tasks=("t2v", "i2v"),
    defaults={
        "t2v": Defaults(steps=50, shift=8.0, guidance=6.0, solver="unipc", **_SIZE),
        "i2v": Defaults(steps=40, shift=5.0, guidance=5.0, solver="unipc", **_SIZE),
    },
    quantized=("blocks.*.self_attn.*", "blocks.*.cross_attn.*", "blocks.*.ffn.*"),
    sensitive=("blocks.*.ffn.2", "blocks.0.*"),
    keep=("patch_embedding", "text_embedding.*", "time_embedding.*", "time_projection.*", "img_emb.*", "head.*"),
    vae_stride=(4, 8, 8),
    patch_size=(1, 2, 2),
    latent_channels=16,
    dit="lightx2v.models.wan.dit:WanDiT",
    layout="lightx2v.models.wan.layout:detect",
    keymap="lightx2v.models.wan.keymap",
    family="lightx2v.families.wan:WAN",
    foldable=_FOLDABLE,
)

_FOUR_STEPS = Defaults(steps=4, shift=5.0, guidance=1.0, solver="euler", step_list=(1000, 750, 500, 250), **_SIZE)

WAN_DISTILL = replace(
    WAN,
    name="wan2.1_distill",
    defaults={"t2v": _FOUR_STEPS, "i2v": _FOUR_STEPS},
    layout="lightx2v.models.wan.layout:detect_distilled",
)
"""Wan2.1, distilled to four steps without classifier-free guidance (LightX2V)."""
