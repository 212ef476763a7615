"""The architecture of a FLUX.1 DiT: from diffusers' `config.json`, or from the shapes of the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightx2v.errors import CheckpointError

_FROM_DIFFUSERS = {
    "num_attention_heads": "num_heads",
    "num_layers": "num_layers",
    "num_single_layers": "num_single_layers",
    "in_channels": "in_dim",
    "joint_attention_dim": "text_dim",
    "pooled_projection_dim": "pooled_dim",
    "guidance_embeds": "guidance",
}
_PATCH = 4
"""Pixels of a 2 x 2 patch."""
_OTHERS = {96: "FLUX.1 with masked inputs", 128: "FLUX.1 Canny or Depth", 384: "FLUX.1 Fill"}
"""Widths of the input of models that see further channels."""


@dataclass(frozen=True)
class FluxArch:
    """The defaults are those of all published models but for `guidance`, which schnell lacks."""

    dim: int = 3072
    ffn_dim: int = 12288
    num_heads: int = 24
    num_layers: int = 19
    """Double-stream blocks."""
    num_single_layers: int = 38
    in_dim: int = 64
    """Numbers of a patch: 4 for each latent channel."""
    text_dim: int = 4096
    pooled_dim: int = 768
    freq_dim: int = 256
    guidance: bool = True
    axes: tuple[int, int, int] = (16, 56, 56)
    """Components of a head that the rotary embedding turns by the position on each axis."""
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def text_len(self) -> int:
        """Text tokens that a prompt is padded to, in training; schnell's are fewer."""
        return 512 if self.guidance else 256

    @staticmethod
    def from_config(config: Mapping[str, Any], where: str = "config.json") -> FluxArch:
        """Read a config of diffusers' `FluxTransformer2DModel`. Raises CheckpointError."""
        missing = [key for key in ("num_attention_heads", "num_layers", "num_single_layers") if key not in config]
        if missing:
            raise CheckpointError(where, f"not the config of a FLUX.1 DiT: {', '.join(missing)} missing")
        if config.get("patch_size", 1) != 1:
            raise CheckpointError(where, f"patch_size is {config['patch_size']!r}", allowed="1")
        found = {"guidance": False} | {new: config[old] for old, new in _FROM_DIFFUSERS.items() if old in config}
        head_dim = config.get("attention_head_dim", 128)
        if not isinstance(head_dim, int) or not isinstance(found["num_heads"], int):
            raise CheckpointError(where, f"attention_head_dim is {head_dim!r}", allowed="a positive whole number")
        found["dim"] = found["num_heads"] * head_dim
        found["ffn_dim"] = 4 * found["dim"]
        found["axes"] = tuple(config.get("axes_dims_rope", (16, 56, 56)))
        arch = FluxArch(**found)
        arch._check(where, config.get("out_channels"))
        return arch

    @staticmethod
    def from_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> FluxArch:
        """Read it off the original names' shapes. Raises CheckpointError.

        What no shape tells is taken as in the published models: an eighth of a head for the first axis of the rotary
        embedding, and the rest for the two others.
        """

        def shape(name: str) -> tuple[int, ...]:
            if name not in shapes:
                raise CheckpointError(where, f"not a FLUX.1 DiT: tensor '{name}' is missing")
            return shapes[name]

        dim, in_dim = shape("img_in.weight")
        head_dim = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
        arch = FluxArch(
            dim=dim,
            ffn_dim=shape("double_blocks.0.img_mlp.0.bias")[0],
            num_heads=dim // head_dim,
            num_layers=_count("double_blocks", shapes),
            num_single_layers=_count("single_blocks", shapes),
            in_dim=in_dim,
            text_dim=shape("txt_in.weight")[1],
            pooled_dim=shape("vector_in.in_layer.weight")[1],
            freq_dim=shape("time_in.in_layer.weight")[1],
            guidance="guidance_in.in_layer.weight" in shapes,
            axes=(head_dim // 8, head_dim // 16 * 7, head_dim // 16 * 7),
        )
        arch._check(where, shape("final_layer.linear.bias")[0])
        return arch

    def _check(self, where: str, out_dim: int | None) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise CheckpointError(where, f"{field.name} is {value!r}", allowed="a positive whole number")
        if self.in_dim in _OTHERS or out_dim not in (None, self.in_dim) or self.in_dim % _PATCH:
            kind = _OTHERS.get(self.in_dim, f"a model with {self.in_dim} inputs and {out_dim} outputs a patch")
            raise CheckpointError(where, f"is {kind}", allowed="FLUX.1 dev, schnell and Kontext")
        if self.dim % self.num_heads or sum(self.axes) != self.head_dim or any(axis % 2 for axis in self.axes):
            raise CheckpointError(
                where,
                f"dim {self.dim} over {self.num_heads} heads, with the axes {list(self.axes)}",
                allowed="three even axes that add up to the width of a head",
            )


def _count(blocks: str, names: Mapping[str, Any]) -> int:
    """How many blocks of one kind there are."""
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith(f"{blocks}.")), default=-1)
