"""Tensor names of the Wan2.1 DiT: the original layout, which the module uses, and diffusers' `transformer` folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
"""Original name of a layer or parameter outside the blocks: diffusers' name."""

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}

BLOCK = {
    **{f"self_attn.{original}": f"attn1.{diffusers}" for original, diffusers in _ATTENTION.items()},
    **{f"cross_attn.{original}": f"attn2.{diffusers}" for original, diffusers in (_ATTENTION | _IMAGE).items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
"""The same within `blocks.N.`."""


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {diffusers: original for original, diffusers in names.items()}


_TOP_BACK, _BLOCK_BACK = _invert(TOP), _invert(BLOCK)


def to_diffusers(name: str) -> str:
    """diffusers' name of an original tensor or layer; a name that is not in the tables is returned as it is."""
    return _rename(name, TOP, BLOCK)


def to_original(name: str) -> str:
    """The original name of a tensor or layer of diffusers; a name that is not in the tables is returned as it is."""
    return _rename(name, _TOP_BACK, _BLOCK_BACK)


def aliases(original: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[str, int, int | None, int]]]:
    """diffusers' name of the tensor `original`, and (original, start, stop, first): all of it."""
    yield to_diffusers(original), (original, 0, None, 0)


def is_unused(name: str) -> bool:
    """Whether a tensor belongs to no layer: `norm_added_q` of published I2V files, `scaled_fp8` of ComfyUI's."""
    return ".norm_added_q." in name or name == "scaled_fp8"


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.match(r"blocks\.\d+\.", name)
    prefix, names = (match[0], block) if match else ("", top)
    layer, leaf = name[len(prefix) :], ""
    while layer not in names and "." in layer:
        layer, _, last = layer.rpartition(".")
        leaf = f".{last}{leaf}"
    return prefix + names[layer] + leaf if layer in names else name
