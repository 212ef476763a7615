"""Tensor names of a source: its layout, and each name in the original layout and in diffusers'. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from lightx2v.convert.options import DIFFUSERS
from lightx2v.encoders import keymap as encoder_names
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.models.flux import keymap as flux_names
from lightx2v.models.wan import keymap as wan_names

Layout = Literal["original", "diffusers"]
Shape = tuple[int, ...]
Place = tuple[str, int, int | None, int]
"""The fields of an `io.lora.Place`."""
Ranges = tuple[tuple[int, int | None], ...]
"""Rows [start, stop) of a tensor; None is its end."""
_FIRST_T5 = ("shared.weight", "encoder.embed_tokens.weight")
_FLUX_DIFFUSERS = re.compile(r"(?:^|\.)(?:single_)?transformer_blocks\.")
_WAN_SAME = tuple(name + "." for name, other in wan_names.TOP.items() if name == other)


@dataclass(frozen=True)
class Naming:
    """Both names of every tensor of one kind of model; None or none for a tensor that a layout lacks."""

    source: Layout
    to_original: Callable[[str], str | None]
    to_diffusers: Callable[[str], tuple[str, ...]]
    aliases: Callable[[str, Shape], Iterable[tuple[str, Place]]] | None = None
    """A family's, where diffusers has apart what is one tensor in the original."""

    def original(self, name: str) -> str | None:
        """The original name of a tensor of the source; None when the layout has no use for it."""
        return name if self.source == "original" else self.to_original(name)

    def named(self, original: str, shape: Shape, layout: Layout) -> Iterable[tuple[str, Place]]:
        """The names that an original tensor of `shape` and its parts have in a layout, each with its place."""
        if layout == "diffusers" and self.aliases is not None:
            return self.aliases(original, shape)
        return ((name, (original, 0, None, 0)) for name in self._names(original, layout))

    def outputs(self, original: str, shape: Shape, layout: Layout) -> dict[str, Ranges]:
        """The tensors of a layout that an original one of `shape` becomes, and which of its rows each takes."""
        found: dict[str, Ranges] = dict.fromkeys(self._names(original, layout), ())
        for name, (_, start, stop, _) in self.named(original, shape, layout):
            if name in found:
                found[name] += ((start, stop),)
        return found

    def _names(self, original: str, layout: Layout) -> tuple[str, ...]:
        return (original,) if layout == "original" else self.to_diffusers(original)


def detect(model_type: str, names: Collection[str], where: str) -> Naming:
    """Tell the layout of a checkpoint by its tensor names.

    Raises CheckpointError for a mixture of layouts, ConfigError for one that cannot be converted.
    """
    if model_type == DIFFUSERS:
        return Naming("original", lambda name: name, lambda name: (name,))
    if model_type == "wan_t5":
        is_original = not any(name in names for name in (*_FIRST_T5, "embed_tokens.weight"))
        tied = _FIRST_T5[1] if _FIRST_T5[0] in names else ""  # the same embedding twice
        return Naming(_layout(is_original), lambda name: None if name == tied else _t5_original(name), _t5_diffusers)
    if model_type == "wan_clip":
        if not encoder_names.is_clip_original(names) and any("self_attn.q_proj" in name for name in names):
            raise ConfigError(
                where, "an image encoder in the layout of transformers", do="give the original models_clip_*.pth"
            )
        return Naming("original", lambda name: name, lambda name: ())
    if model_type == "flux_dit":
        is_original = not any(map(_FLUX_DIFFUSERS.search, names))
        return Naming(_layout(is_original), flux_names.to_original, _flux_diffusers, flux_names.aliases)
    if model_type == "flux_t5":  # every file has the names of transformers, though with a prefix where it holds more
        tied = _FIRST_T5[1] if any(name.endswith(_FIRST_T5[0]) for name in names) else ""
        return Naming("diffusers", lambda name: None if name == tied else name, lambda name: (name,))
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


def _wan_diffusers(name: str) -> tuple[str, ...]:
    renamed = wan_names.to_diffusers(name)
    return (renamed,) if renamed != name or name.startswith(_WAN_SAME) else ()


def _flux_diffusers(name: str) -> tuple[str, ...]:
    parts = flux_names.to_diffusers(name)
    return () if parts == (name,) else parts


def _t5_original(name: str) -> str | None:
    return encoder_names.T5.to_original(encoder_names.t5_from_diffusers(name))


def _t5_diffusers(name: str) -> tuple[str, ...]:
    found = encoder_names.T5.to_module(name)
    return tuple("shared.weight" if part == "embed_tokens.weight" else f"encoder.{part}" for part in found)
