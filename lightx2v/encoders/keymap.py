"""Tensor names of Wan's text and image encoders: the original layout, transformers' modules, diffusers' files.

The original names are the ones that configurations, plans and quantized checkpoints use. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lightx2v.errors import CheckpointError


class Header(Protocol):
    """What a checkpoint tells before any tensor is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class NameMap:
    """Original names to names in the module, both ways. A fused original layer has several module names."""

    blocks: tuple[str, str]
    """The list of blocks, in the original and in the module."""
    block: Mapping[str, tuple[str, ...]]
    """Layers of one block."""
    top: Mapping[str, str]
    """Layers outside the blocks."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose last name differs too."""
    linears: tuple[str, ...] = ()
    """The layers of a block that can be quantized."""

    def to_module(self, name: str) -> tuple[str, ...]:
        """Module names of an original tensor or layer; () when there is none."""
        if name in self.parameters:
            return (self.parameters[name],)
        for layer, leaf in _splits(name):
            if layer in self.top:
                return (self.top[layer] + leaf,)
            index, inner = _in_block(layer, self.blocks[0])
            if inner in self.block:
                return tuple(f"{self.blocks[1]}.{index}.{target}{leaf}" for target in self.block[inner])
        return ()

    def to_original(self, name: str) -> str | None:
        """The original name of a module's tensor or layer (of the fused layer for each of its parts)."""
        for original, target in self.parameters.items():
            if name == target:
                return original
        for layer, leaf in _splits(name):
            for original, target in self.top.items():
                if layer == target:
                    return original + leaf
            index, inner = _in_block(layer, self.blocks[1])
            for original, targets in self.block.items():
                if inner in targets:
                    return f"{self.blocks[0]}.{index}.{original}{leaf}"
        return None

    def layers(self, originals: Iterable[str]) -> int:
        """Number of blocks among original tensor names."""
        found = [_in_block(name, self.blocks[0])[0] for name in originals]
        return 1 + max((int(index) for index in found if index), default=-1)


def _splits(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """A name as a layer, and as a layer and the leaf of one of its tensors."""
    layer, dot, leaf = name.rpartition(".")
    return (name, ""), (layer, dot + leaf)


def _in_block(layer: str, blocks: str) -> tuple[str, str]:
    """("3", "attn.q") for "blocks.3.attn.q"; ("", "") for a name outside the blocks."""
    match = re.match(re.escape(blocks) + r"\.(\d+)\.(.+)", layer)
    return (match[1], match[2]) if match else ("", "")


T5 = NameMap(
    blocks=("blocks", "block"),
    block={
        "norm1": ("layer.0.layer_norm",),
        "attn.q": ("layer.0.SelfAttention.q",),
        "attn.k": ("layer.0.SelfAttention.k",),
        "attn.v": ("layer.0.SelfAttention.v",),
        "attn.o": ("layer.0.SelfAttention.o",),
        "pos_embedding.embedding": ("layer.0.SelfAttention.relative_attention_bias",),
        "norm2": ("layer.1.layer_norm",),
        "ffn.gate.0": ("layer.1.DenseReluDense.wi_0",),
        "ffn.fc1": ("layer.1.DenseReluDense.wi_1",),
        "ffn.fc2": ("layer.1.DenseReluDense.wo",),
    },
    top={"token_embedding": "embed_tokens", "norm": "final_layer_norm"},
    linears=("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2"),
)
"""Module names are those of transformers' UMT5 encoder stack, which holds the token embedding itself."""

CLIP = NameMap(
    blocks=("visual.transformer", "encoder.layers"),
    block={
        "norm1": ("layer_norm1",),
        "attn.to_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.out_proj",),
        "norm2": ("layer_norm2",),
        "mlp.0": ("mlp.fc1",),
        "mlp.2": ("mlp.fc2",),
    },
    top={
        "visual.patch_embedding": "embeddings.patch_embedding",
        "visual.pre_norm": "pre_layrnorm",
        "visual.post_norm": "post_layernorm",
    },
    parameters={
        "visual.cls_embedding": "embeddings.class_embedding",
        "visual.pos_embedding": "embeddings.position_embedding.weight",
    },
    linears=("attn.to_qkv", "attn.proj", "mlp.0", "mlp.2"),
)

T5_V1_1 = NameMap(
    blocks=("encoder.block", "block"),
    block={target: (target,) for targets in T5.block.values() for target in targets},
    top={"shared": "embed_tokens", "encoder.final_layer_norm": "final_layer_norm"},
    linears=tuple(T5.block[layer][0] for layer in T5.linears),
)
"""FLUX's text encoder: the original names are those of transformers' whole model, in every published file."""

CLIP_TEXT = NameMap(
    blocks=("text_model.encoder.layers", "encoder.layers"),
    block={
        layer: (layer,)
        for layer in (
            *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
            *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        )
    },
    top={
        "text_model.embeddings.token_embedding": "embeddings.token_embedding",
        "text_model.embeddings.position_embedding": "embeddings.position_embedding",
        "text_model.final_layer_norm": "final_layer_norm",
    },
    linears=(
        *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *("mlp.fc1", "mlp.fc2"),
    ),
)
"""CLIP's text tower; the newest versions of transformers leave the first component of the names out."""


def is_t5_original(names: Iterable[str]) -> bool:
    return "token_embedding.weight" in names


def t5_from_diffusers(name: str) -> str:
    """Name in the module of a tensor in diffusers' `text_encoder` folder."""
    return "embed_tokens.weight" if name == "shared.weight" else name.removeprefix("encoder.")


def is_clip_original(names: Iterable[str]) -> bool:
    return "visual.patch_embedding.weight" in names


def clip_from_diffusers(name: str) -> str:
    """Name in the module of a tensor in diffusers' `image_encoder` folder, written by any version of transformers."""
    return name.removeprefix("vision_model.")


def t5_linear_shapes(tensors: Mapping[str, Header], where: str) -> dict[str, tuple[int, int]]:
    """(N, K) of each text-encoder layer that can be quantized, under its original name, from headers of either layout.

    `where` names the file in errors. Raises CheckpointError when a layer is missing or the file is another model's.
    """
    if not is_t5_original(tensors):
        tensors = {T5.to_original(t5_from_diffusers(name)) or name: info for name, info in tensors.items()}
    return _linear_shapes(T5, tensors, T5.layers(tensors), where)


def clip_linear_shapes(tensors: Mapping[str, Header], where: str) -> dict[str, tuple[int, int]]:
    """(N, K) of each image-encoder layer that can be quantized, as `t5_linear_shapes`.

    The last block is not among them: Wan takes the states that enter it.
    """
    if is_clip_original(tensors):
        return _linear_shapes(CLIP, tensors, CLIP.layers(tensors) - 1, where)
    originals = {CLIP.to_original(clip_from_diffusers(name)) or name: info for name, info in tensors.items()}
    shapes = _linear_shapes(CLIP, originals, CLIP.layers(originals) - 1, where)
    # Apart in diffusers' files, and each of the three a third of what the original fuses.
    return {name: (3 * n, k) if name.endswith("to_qkv") else (n, k) for name, (n, k) in shapes.items()}


def t5_v1_1_linear_shapes(tensors: Mapping[str, Header], where: str) -> dict[str, tuple[int, int]]:
    """(N, K) of each layer of FLUX's T5 that can be quantized, as `t5_linear_shapes`."""
    return _linear_shapes(T5_V1_1, tensors, T5_V1_1.layers(tensors), where)


def clip_text_original(name: str) -> str:
    """The original name of a tensor of CLIP's text tower, written by any version of transformers."""
    return name if name.startswith(("text_model.", "text_projection.", "logit_scale")) else f"text_model.{name}"


def clip_text_linear_shapes(tensors: Mapping[str, Header], where: str) -> dict[str, tuple[int, int]]:
    """(N, K) of each layer of CLIP's text tower that can be quantized, as `t5_linear_shapes`."""
    originals = {clip_text_original(name): info for name, info in tensors.items()}
    return _linear_shapes(CLIP_TEXT, originals, CLIP_TEXT.layers(originals), where)


def _linear_shapes(
    names: NameMap, tensors: Mapping[str, Header], layers: int, where: str
) -> dict[str, tuple[int, int]]:
    if layers < 1:
        raise CheckpointError(where, f"no tensors named '{names.blocks[0]}.N...': not the encoder that is wanted")
    shapes = {}
    for index in range(layers):
        for layer in names.linears:
            name = f"{names.blocks[0]}.{index}.{layer}"
            if f"{name}.weight" not in tensors:
                raise CheckpointError(where, f"tensor '{name}.weight' is missing")
            n, k = tensors[f"{name}.weight"].shape
            shapes[name] = (n, k)
    return shapes
