"""The architecture of a Wan2.1 DiT, read from the `config.json` beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightx2v.errors import CheckpointError

_FROM_DIFFUSERS = {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_attention_heads": "num_heads",
    **{key: key for key in ("ffn_dim", "freq_dim", "text_dim", "image_dim", "num_layers", "patch_size", "eps")},
    "cross_attn_norm": "cross_attn_norm",
}


@dataclass(frozen=True)
class WanArch:
    """Fields as in the original `config.json`; the defaults are what that file leaves out."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int = 1280
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    model_type: str = "t2v"

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @staticmethod
    def from_config(config: Mapping[str, Any], where: str = "config.json") -> WanArch:
        """Read the original's keys, or those of diffusers' `WanTransformer3DModel`. Raises CheckpointError."""
        found = _from_diffusers(config, where) if "num_attention_heads" in config else config
        known = {field.name for field in fields(WanArch)}
        values = {key: value for key, value in found.items() if key in known and value is not None}
        missing = [key for key in ("dim", "ffn_dim", "num_heads", "num_layers") if key not in values]
        if missing:
            raise CheckpointError(
                where, f"not the config of a Wan2.1 DiT: {', '.join(missing)} missing", do="give the directory of one"
            )
        if isinstance(values.get("patch_size"), list):
            values["patch_size"] = tuple(values["patch_size"])
        arch = WanArch(**values)
        arch._check(where)
        return arch

    def _check(self, where: str) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise CheckpointError(where, f"{field.name} is {value!r}", allowed="a positive whole number")
        if self.patch_size != (1, 2, 2):
            raise CheckpointError(where, f"patch_size is {self.patch_size!r}", allowed="[1, 2, 2]")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise CheckpointError(
                where, f"dim {self.dim} over num_heads {self.num_heads}", allowed="heads of one even width"
            )
        if self.model_type not in ("t2v", "i2v"):
            raise CheckpointError(where, f"model_type '{self.model_type}' is not supported", allowed="t2v, i2v")


def _from_diffusers(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of WanArch in a config of diffusers' `WanTransformer3DModel`."""
    if config.get("pos_embed_seq_len") is not None:
        raise CheckpointError(where, "a first-and-last-frame model (pos_embed_seq_len)", allowed="t2v and i2v models")
    found = {new: config[old] for old, new in _FROM_DIFFUSERS.items() if old in config}
    found["dim"] = config["num_attention_heads"] * config.get("attention_head_dim", 128)
    found["qk_norm"] = config.get("qk_norm", "rms_norm_across_heads") is not None
    found["model_type"] = "i2v" if config.get("added_kv_proj_dim") is not None else "t2v"
    return found
