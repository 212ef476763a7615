"""msModelSlim's files (https://gitcode.com/Ascend/msmodelslim, 26.1): weights, and JSON that names the type of each.

    quant_model_weight_<type>.safetensors        and, for each of its tensors,
    quant_model_description_<type>.json          "<layer>.weight": "W8A8_DYNAMIC"; FLOAT for what is not quantized

    W8A8            weight int8 [N, K], input_scale, input_offset, deq_scale [N] = input_scale * weight_scale,
                    quant_bias, perhaps weight_scale [N, 1]; of fp16 models deq_scale is int64, bits of float32
    W8A8_DYNAMIC    weight int8, weight_scale [N, 1], weight_offset: zeros
    W8A8_TIMESTEP   as W8A8, with weight_scale; the tensors of the input are stacked, one entry for a step
    W8A16           weight int8, weight_scale and weight_offset [N, G]: value = (code - offset) * scale
    W8A8_MXFP8, W4A4_MXFP4    weight e4m3, or e2m1 in pairs, the first low; weight_scale uint8 [N, K / 32], of which
                    127 is 1 and each step a power of two
    ..._SVD         and <layer>.svd_lowrank_l1 [R, K], .svd_lowrank_l2 [N, R]
    <layer>.div.mul_scale [K] before <layer>.linear.weight: the input is multiplied with it
    FAQuant         <attention>.fa_q.scale [H, 1], fa_k, fa_v, and zeros as offsets

int8 codes of an input are round(x / input_scale) + input_offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import Found, Translation, read_json

WEIGHTS, DESCRIPTION = "quant_model_weight", "quant_model_description"
FLOAT, _ATTENTION = "FLOAT", "FAQuant"
MULTIPLIER, INNER = ".div.mul_scale", ".linear"
LOW_RANK = {"svd_lowrank_l1": "lowrank_down", "svd_lowrank_l2": "lowrank_up"}
_BLOCK = 32


class MsModelSlim:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        return found.checkpoint.files[0].name.startswith(WEIGHTS)

    def translate(self, found: Found) -> Translation:
        """Every type above; inputs of W8A8_TIMESTEP are static from the middle of the steps on, as in its examples."""
        types = _types(found)
        translation = Translation(found)
        for name, kind in types.items():
            layer = name.removesuffix(".weight")
            if layer == name or kind == FLOAT or name not in found.tensors:
                continue
            reader = _READERS.get(kind.replace("_SVD", ""))
            if reader is None:
                raise found.refuse(f"'{name}' is of type {kind}", ", ".join((FLOAT, _ATTENTION, *_READERS)))
            _Layer(translation, layer, kind).add(*reader)
        _attention(translation, types)
        return translation


DIALECT = MsModelSlim()


def _types(found: Found) -> dict[str, str]:
    """The type of each tensor. Raises CheckpointError where no description lies beside the weights."""
    paths = sorted(found.folder.glob(f"{DESCRIPTION}*.json"))
    suffix = found.checkpoint.files[0].name.removeprefix(WEIGHTS).partition(".")[0]
    own = [path for path in paths if suffix.startswith(path.stem.removeprefix(DESCRIPTION))]
    if len(own or paths) != 1:
        there = ", ".join(path.name for path in paths) or "none"
        raise found.refuse(f"needs the one {DESCRIPTION}*.json beside it; there: {there}", do="copy it too")
    said = read_json((own or paths)[0]) or {}
    types = {name: str(kind) for name, kind in said.items() if name in found.tensors}
    if unsaid := [name for name in found.tensors if name not in types]:
        raise found.refuse(f"{(own or paths)[0].name} does not name '{unsaid[0]}'", do="copy the one of these weights")
    return types


class _Layer:
    """One quantized linear on its way into a translation."""

    def __init__(self, translation: Translation, layer: str, kind: str) -> None:
        self.translation, self.layer, self.kind = translation, layer, kind
        self.found = translation.found
        shape = self.found.tensors[f"{layer}.weight"].shape
        if len(shape) != 2:
            raise self.found.refuse(f"'{layer}.weight' of type {kind} has shape {list(shape)}", "[N, K]")
        self.n, self.width = shape

    def name(self, leaf: str, shape: tuple[int, ...] | None = None) -> str:
        """The name of one of its tensors. Raises CheckpointError where it is missing or of another shape."""
        name = f"{self.layer}.{leaf}"
        info = self.found.tensors.get(name)
        if info is None or (shape is not None and info.shape not in (shape, shape[:1] if shape[1:] == (1,) else shape)):
            problem = "is missing" if info is None else f"has shape {list(info.shape)}, wanted is {list(shape or ())}"
            raise self.found.refuse(f"'{name}', which {self.kind} has, {problem}", do="export the model again")
        return name

    def has(self, leaf: str) -> bool:
        return f"{self.layer}.{leaf}" in self.found.tensors

    def add(self, mm_type: str, dtype: str, leaves: Any) -> None:
        """Put it into the translation, with what stands around it."""
        info = self.found.tensors[f"{self.layer}.weight"]
        if info.dtype != dtype:
            raise self.found.refuse(f"'{info.name}' of type {self.kind} is {info.dtype}", dtype)
        k = 2 * self.width if dtype == "U8" else self.width
        made: dict[str, Made] = leaves(self, k)
        if self.kind.count("_SVD"):
            for theirs, ours in LOW_RANK.items():
                made[ours] = self.translation.same(self.name(theirs))
        outer = self.layer.removesuffix(INNER)
        multiplier = f"{outer}{MULTIPLIER}"
        if outer != self.layer and multiplier in self.found.tensors:
            made["input_multiplier"] = Made((multiplier,), lambda given: given[multiplier].float().view(k), "F32", (k,))
        else:
            outer = self.layer
        if (bias := f"{self.layer}.bias") in self.found.tensors and outer != self.layer:
            self.translation.rename(bias, f"{outer}.bias")
        for rest in ("weight_scale", "weight_offset", "deq_scale", "quant_bias", "input_scale", "input_offset"):
            if self.has(rest):
                self.translation.take(f"{self.layer}.{rest}")
        name = mm_type or f"int8-g{k // self.groups()}-asym" if self.groups() > 1 else mm_type or "int8-channel-asym"
        self.translation.layer(outer, name, made, self.n, k)

    def groups(self) -> int:
        """Scales of a row."""
        shape = self.found.tensors[self.name("weight_scale")].shape if self.has("weight_scale") else (1,)
        return shape[1] if len(shape) > 1 else 1

    def symmetric(self, leaf: str = "weight") -> Made:
        """The codes [N, K], once it is seen that no offset belongs to them."""
        weight = self.name(leaf)
        if not self.has("weight_offset"):
            return self.translation.same(weight)
        offset = self.name("weight_offset")

        def make(given: Given) -> Tensor:
            if bool(given[offset].any()):
                raise self.found.refuse(f"'{offset}' of type {self.kind} is not zero", "symmetric codes")
            return given[weight]

        return self.translation.same(weight)._replace(needs=(weight, offset), make=make)


def _per_channel(layer: _Layer, k: int) -> dict[str, Made]:
    scale, n = layer.name("weight_scale", (layer.n, 1)), layer.n
    return {
        "weight": layer.symmetric(),
        "weight_scale": Made((scale,), lambda given: given[scale].float().view(n, 1), "F32", (n, 1)),
    }


def _static(layer: _Layer, k: int) -> dict[str, Made]:
    n, scale, offset = layer.n, layer.name("input_scale", (1,)), layer.name("input_offset", (1,))
    leaves = {
        "input_scale": Made((scale,), lambda given: given[scale].float().view(1), "F32", (1,)),
        "input_zero": Made((offset,), lambda given: given[offset].float().view(1), "F32", (1,)),
    }
    if layer.has("weight_scale"):
        return {**_per_channel(layer, k), **leaves}
    both = layer.name("deq_scale", (n,))

    def weight_scale(given: Given) -> Tensor:
        held = given[both]
        bits = held.to(torch.int32).view(torch.float32) if held.dtype == torch.int64 else held.float()
        return (bits / given[scale].float()).view(n, 1)

    return {"weight": layer.symmetric(), "weight_scale": Made((both, scale), weight_scale, "F32", (n, 1)), **leaves}


def _timestep(layer: _Layer, k: int) -> dict[str, Made]:
    """Found per token before the middle of the steps, then under the scale that is stored for that step."""
    steps = layer.found.tensors[layer.name("input_scale")].shape[0]
    scale, offset = layer.name("input_scale"), layer.name("input_offset")
    middle, first = steps // 2, torch.tensor([steps, steps // 2], dtype=torch.int32)

    def entry(name: str) -> Made:
        return Made((name,), lambda given: given[name].float().reshape(steps, -1)[middle], "F32", (1,))

    return {
        **_per_channel(layer, k),
        "input_scale": entry(scale),
        "input_zero": entry(offset),
        "input_steps": Made((), lambda given: first, "I32", (2,)),
    }


def _weight_only(layer: _Layer, k: int) -> dict[str, Made]:
    """Codes and offsets of int8 as ones of uint8."""
    n, groups = layer.n, layer.groups()
    weight, scale = layer.name("weight"), layer.name("weight_scale", (n, groups))
    offset = layer.name("weight_offset", (n, groups))
    return {
        "weight": Made((weight,), lambda given: given[weight].view(torch.uint8) ^ 128, "U8", (n, k)),
        "weight_scale": Made((scale,), lambda given: given[scale].float().view(n, groups), "F32", (n, groups)),
        "weight_zero": Made((offset,), lambda given: given[offset].float().view(n, groups) + 128, "F32", (n, groups)),
    }


def _blocks(layer: _Layer, k: int) -> dict[str, Made]:
    """MX formats, in the layout that is written here: bytes, and scales in the order that no other is taken for."""
    n, groups = layer.n, -(-k // _BLOCK)
    weight, scale = layer.name("weight"), layer.name("weight_scale", (n, groups))
    return {
        "weight": Made((weight,), lambda given: given[weight].view(torch.uint8), "U8", (n, layer.width)),
        "weight_scale": layer.translation.swizzled(scale, n, groups),
    }


_READERS: Mapping[str, tuple[str, str, Any]] = {
    "W8A8": ("int8-static-asym", "I8", _static),
    "W8A8_DYNAMIC": ("int8", "I8", _per_channel),
    "W8A8_TIMESTEP": ("int8-timestep", "I8", _timestep),
    "W8A16": ("", "I8", _weight_only),
    "W8A8_MXFP8": ("mxfp8", "F8_E4M3", _blocks),
    "W4A4_MXFP4": ("mxfp4", "U8", _blocks),
}
"""mm_type ("": by the groups), dtype of the codes and how the tensors come about, by type."""


def _attention(translation: Translation, types: Mapping[str, str]) -> None:
    """Scales of the heads of an attention as `attention.scales` has them."""
    found = translation.found
    for name, kind in types.items():
        if kind != _ATTENTION:
            continue
        module, _, leaf = name.rpartition(".")
        attention, _, part = module.rpartition(".fa_")
        if part not in ("q", "k", "v") or leaf not in ("scale", "offset") or "transformer_blocks." in name:
            raise found.refuse(f"'{name}' is of type {_ATTENTION}", "fa_q, fa_k and fa_v of Wan's own names")
        translation.take(name)
        if leaf == "scale":
            heads = found.tensors[name].shape[0]

            def scales(given: Given, name: str = name, heads: int = heads) -> Tensor:
                return given[name].float().reshape(heads)

            translation.add(f"{attention}.attn_scales.{part}", Made((name,), scales, "F32", (heads,)))
