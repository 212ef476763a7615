"""Tensor names of the FLUX.1 DiT: the original layout, which the module uses, and diffusers' `transformer` folder.

Several projections of the same tokens are one layer in the original, whose rows are theirs one after the other. The
two halves of the last modulation come in the other order in diffusers. ComfyUI's files put a prefix before the original
names where they hold more than the DiT. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

PREFIX = "model.diffusion_model."
"""ComfyUI's, before every tensor of the DiT in a file that holds a VAE and text encoders too."""

SWAPPED = "final_layer.adaLN_modulation.1"
"""The layer whose halves, shift and scale, diffusers exchanges."""

_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}

TOP: Mapping[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **{f"{name}.in_layer": (f"time_text_embed.{other}.linear_1",) for name, other in _EMBEDDERS.items()},
    **{f"{name}.out_layer": (f"time_text_embed.{other}.linear_2",) for name, other in _EMBEDDERS.items()},
    "final_layer.linear": ("proj_out",),
    SWAPPED: ("norm_out.linear",),
}
"""Original name of a layer outside the blocks: diffusers' name."""

DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
"""The same within `double_blocks.N.`, diffusers' `transformer_blocks.N.`; the parts of a layer in their order."""

SINGLE: Mapping[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
"""The same within `single_blocks.N.`, diffusers' `single_transformer_blocks.N.`."""

XLABS: Mapping[str, tuple[str, int | None]] = {
    "img_attn.qkv": ("qkv_lora1", None),
    "txt_attn.qkv": ("qkv_lora2", None),
    "img_attn.proj": ("proj_lora1", None),
    "txt_attn.proj": ("proj_lora2", None),
    "linear1": ("qkv", 3),
    "linear2": ("proj", None),
}
"""Layers of a block that XLabs' LoRAs name in their own way, and how many times the width they have of its rows."""

_WHOLE: Mapping[str, Mapping[str, str]] = {
    "double_blocks": {"attn.to_qkv": "img_attn.qkv", "attn.to_added_qkv": "txt_attn.qkv"},
    "single_blocks": {"attn.to_qkv_mlp_proj": "linear1"},
}
"""Names in the manner of diffusers of layers that it has apart, put together; `io.dialects` gives some."""

_BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}


class Part(NamedTuple):
    """A tensor or layer of the original, and which of its parts a name is."""

    original: str
    part: int = 0
    parts: int = 1


def _invert(names: Mapping[str, tuple[str, ...]]) -> dict[str, Part]:
    return {
        part: Part(original, index, len(parts)) for original, parts in names.items() for index, part in enumerate(parts)
    }


_TOP_BACK = _invert(TOP)
_BLOCKS_BACK = {
    other: (original, _invert(names) | {whole: Part(layer) for whole, layer in _WHOLE[original].items()})
    for original, (other, names) in _BLOCKS.items()
}


def part_of(name: str) -> Part:
    """Where the tensor or layer `name`, of any layout, is in the original; a name that is not known is left alone."""
    name = name.removeprefix(PREFIX)
    match = re.match(r"((?:single_)?transformer_blocks)\.(\d+)\.", name)
    blocks, back = _BLOCKS_BACK[match[1]] if match else ("", _TOP_BACK)
    prefix = f"{blocks}.{match[2]}." if match else ""
    for layer, leaf in _splits(name[match.end() :] if match else name):
        if layer in back:
            found = back[layer]
            norm = found.original.endswith("_norm") and leaf == ".weight"
            return found._replace(original=f"{prefix}{found.original}{'.scale' if norm else leaf}")
    return Part(name)


def to_original(name: str) -> str:
    """The original name of a tensor or layer of any layout; of the whole layer for each of its parts."""
    return part_of(name).original


def to_diffusers(name: str) -> tuple[str, ...]:
    """diffusers' names of the parts of an original tensor or layer; a name that is not known is returned as it is."""
    match = re.match(r"(double_blocks|single_blocks)\.(\d+)\.", name)
    blocks, names = _BLOCKS[match[1]] if match else ("", TOP)
    prefix = f"{blocks}.{match[2]}." if match else ""
    for layer, leaf in _splits(name[match.end() :] if match else name):
        if layer in names:
            norm = layer.endswith("_norm") and leaf == ".scale"
            return tuple(f"{prefix}{part}{'.weight' if norm else leaf}" for part in names[layer])
    return (name,)


def is_unused(name: str) -> bool:
    """Whether a tensor is none of the DiT's: ComfyUI's mark, and the other models in one of its files."""
    return name == "scaled_fp8" or name.startswith(("text_encoders.", "vae."))


def aliases(original: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[str, int, int | None, int]]]:
    """Names of the tensor `original` in diffusers and in XLabs' LoRAs, each with (original, start, stop, first).

    The rows of the named tensor from `first` on are the rows [start, stop) of `original`; None is its end.
    """
    block = re.match(r"(?:double|single)_blocks\.\d+\.", original)
    layer, _, leaf = original[block.end() if block else 0 :].rpartition(".")
    if block and layer in XLABS and leaf == "weight":
        name, widths = XLABS[layer]
        yield f"{block[0]}{name}.weight", (original, 0, None if widths is None else widths * shape[1], 0)
    parts = to_diffusers(original)
    if original.rpartition(".")[0] == SWAPPED:
        half = shape[0] // 2
        yield parts[0], (original, half, None, 0)
        yield parts[0], (original, 0, half, half)
        return
    # The last part of four, the way up of the feed-forward, is four times as wide as the others.
    width = shape[0] // (7 if len(parts) == 4 else len(parts))
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        yield part, (original, index * width, None if last else (index + 1) * width, 0)


def _splits(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """A name as a layer, and as a layer and the leaf of one of its tensors."""
    layer, dot, leaf = name.rpartition(".")
    return (name, ""), (layer, dot + leaf)
