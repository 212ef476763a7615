"""Tensor names of a source: its layout, and each name in the original layout and in diffusers'. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from lightx2v.convert.options import DIFFUSERS
from lightx2v.encoders import keymap as encoder_names
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.models.wan import keymap as wan_names

Layout = Literal["original", "diffusers"]
_FIRST_T5 = ("shared.weight", "encoder.embed_tokens.weight")
_WAN_SAME = tuple(name + "." for name, other in wan_names.TOP.items() if name == other)


@dataclass(frozen=True)
class Naming:
    """Both names of every tensor of one kind of model; None for a name that a layout lacks."""

    source: Layout
    to_original: Callable[[str], str | None]
    to_diffusers: Callable[[str], str | None]

    def original(self, name: str) -> str | None:
        """The original name of a tensor of the source; None when the layout has no use for it."""
        return name if self.source == "original" else self.to_original(name)

    def output(self, original: str, layout: Layout) -> str | None:
        return original if layout == "original" else self.to_diffusers(original)


def detect(model_type: str, names: Collection[str], where: str) -> Naming:
    """Tell the layout of a checkpoint by its tensor names.

    Raises CheckpointError for a mixture of layouts, ConfigError for one that cannot be converted.
    """
    if model_type == DIFFUSERS:
        return Naming("original", lambda name: name, lambda name: name)
    if model_type == "wan_t5":
        is_original = not any(name in names for name in (*_FIRST_T5, "embed_tokens.weight"))
        tied = _FIRST_T5[1] if _FIRST_T5[0] in names else ""  # the same embedding twice
        return Naming(_layout(is_original), lambda name: None if name == tied else _t5_original(name), _t5_diffusers)
    if model_type == "wan_clip":
        if not encoder_names.is_clip_original(names) and any("self_attn.q_proj" in name for name in names):
            raise ConfigError(
                where, "an image encoder in the layout of transformers", do="give the original models_clip_*.pth"
            )
        return Naming("original", lambda name: name, lambda name: None)
    return _detect_wan(names, where)


def _detect_wan(names: Collection[str], where: str) -> Naming:
    diffusers = [name for name in names if wan_names.to_original(name) != name]
    original = [name for name in names if wan_names.to_diffusers(name) != name]
    if diffusers and original:
        raise CheckpointError(
            where, f"mixes names of diffusers ('{diffusers[0]}') and of the original ('{original[0]}')"
        )
    return Naming(_layout(not diffusers), _wan_original, _wan_diffusers)


def _layout(original: bool) -> Layout:
    return "original" if original else "diffusers"


def _wan_original(name: str) -> str | None:
    return None if wan_names.is_unused(name) else wan_names.to_original(name)


def _wan_diffusers(name: str) -> str | None:
    renamed = wan_names.to_diffusers(name)
    return renamed if renamed != name or name.startswith(_WAN_SAME) else None


def _t5_original(name: str) -> str | None:
    return encoder_names.T5.to_original(encoder_names.t5_from_diffusers(name))


def _t5_diffusers(name: str) -> str | None:
    found = encoder_names.T5.to_module(name)
    if not found:
        return None
    return "shared.weight" if found[0] == "embed_tokens.weight" else f"encoder.{found[0]}"
