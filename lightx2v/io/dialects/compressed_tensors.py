"""compressed-tensors' files, as llm-compressor writes them (https://github.com/vllm-project/compressed-tensors, 0.20).

`quantization_config` of config.json names groups of layers, and of each the bits, the sharing of scales and the format:

    pack-quantized          weight_packed int32 [N, ceil(K * bits / 32)], of code + 2^(bits - 1), bit after bit;
                            weight_shape int64 [2]; weight_scale [N, G]; weight_zero_point int32, packed along N
    int-quantized, float-quantized, naive-quantized     weight int8 or e4m3 [N, K], weight_scale, perhaps input_scale
    nvfp4-pack-quantized    weight_packed uint8 [N, K / 2], weight_scale e4m3 [N, K / 16], weight_global_scale [1]
    mxfp4-pack-quantized    weight_packed uint8 [N, K / 2], weight_scale uint8 [N, K / 32]

value = (code - zero_point) * scale, over the global scale if there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import INT8_AFFINE, Found, Translation
from lightx2v.mm.scheme import parse
from lightx2v.quant.packing import swapped_sign

_PACKED_BITS = (2, 3, 4, 8)
_LINEAR = "Linear"
_OURS = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("input_scale", "input_zero_point"),
)


class CompressedTensors:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        method = found.config.get("quant_method")
        return method == "compressed-tensors" or any(name.endswith(".weight_packed") for name in found.tensors)

    def translate(self, found: Found) -> Translation:
        """Integers of 2, 3, 4 and 8 bits, e4m3, nvfp4 and mxfp4."""
        groups = found.config.get("config_groups")
        if not isinstance(groups, dict):
            raise found.refuse("its config.json has no quantization_config with config_groups", do="copy it too")
        translation = Translation(found)
        shapes = found.load([name for name in found.tensors if name.endswith(".weight_shape")])
        for layer in found.ending(".weight_scale"):
            _Layer(translation, layer, _group_of(found, layer, groups), shapes).add()
        return translation


DIALECT = CompressedTensors()


def _group_of(found: Found, layer: str, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of a layer: one that names it, or one whose expression matches it, before the one of all linears."""

    def rank(target: str) -> int:
        if target == layer:
            return 0
        if target.startswith("re:") and re.match(target[3:], layer):
            return 1
        return 2 if target == _LINEAR else 3

    ranked = [(min(map(rank, group.get("targets", ())), default=3), name) for name, group in groups.items()]
    best = min(ranked, default=(3, ""))
    if best[0] == 3:
        raise found.refuse(f"no group of quantization_config is for '{layer}', which has a scale")
    group: Mapping[str, Any] = groups[best[1]]
    return group


@dataclass(frozen=True)
class _Layer:
    """One quantized linear and what its group says."""

    translation: Translation
    layer: str
    group: Mapping[str, Any]
    shapes: Given

    @property
    def weights(self) -> Mapping[str, Any]:
        return self.group.get("weights") or {}

    @property
    def format(self) -> str:
        return str(self.group.get("format") or self.translation.found.config.get("format"))

    def refuse(self, what: str, allowed: str = "") -> CheckpointError:
        return self.translation.found.refuse(f"'{self.layer}' ({self.format}) {what}", allowed)

    def has(self, leaf: str) -> bool:
        return f"{self.layer}.{leaf}" in self.translation.found.tensors

    def name(self, leaf: str) -> str:
        if not self.has(leaf):
            raise self.refuse(f"lacks '{leaf}'")
        return f"{self.layer}.{leaf}"

    def shape(self, leaf: str) -> tuple[int, ...]:
        return self.translation.found.tensors[self.name(leaf)].shape

    def add(self) -> None:
        """Put it into the translation."""
        if self.has("weight_g_idx"):
            raise self.refuse("has a 'weight_g_idx': its columns are in groups out of order")
        if self.format == "pack-quantized":
            mm_type, leaves, n, k = self._packed()
        elif self.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            mm_type, leaves, n, k = self._four_bit_floats()
        elif self.format in ("int-quantized", "float-quantized", "naive-quantized"):
            mm_type, leaves, n, k = self._bytes()
        else:
            raise self.refuse("is not read", "pack-, int-, float-, naive-quantized, nvfp4- and mxfp4-pack-quantized")
        self.translation.take(*(self.name(leaf) for leaf in _OURS if self.has(leaf)))
        self.translation.layer(self.layer, mm_type, leaves, n, k)

    def _inputs(self) -> str:
        """How scales of inputs are shared: "float" where they are not quantized."""
        said = self.group.get("input_activations")
        if not said:
            return "float"
        if not said.get("symmetric", True):
            raise self.refuse("has inputs with zero points", "symmetric ones")
        strategy = str(said.get("strategy"))
        return f"static {strategy}" if said.get("dynamic") is False else strategy

    def _packed(self) -> tuple[str, dict[str, Made], int, int]:
        bits, strategy = self.weights.get("num_bits"), self.weights.get("strategy")
        if bits not in _PACKED_BITS or strategy not in ("group", "channel") or self._inputs() != "float":
            raise self.refuse(
                f"has {bits} bits per {strategy}, inputs {self._inputs()}", "2, 3, 4 or 8 per group or channel, floats"
            )
        packed, scale = self.name("weight_packed"), self.name("weight_scale")
        n, k = (int(size) for size in self.shapes[self.name("weight_shape")])
        groups = self.shape("weight_scale")[-1]
        symmetric = bool(self.weights.get("symmetric", True))
        sharing = f"g{k // groups}" if strategy == "group" else "channel"
        mm_type = f"int{bits}-{sharing}" + ("" if symmetric else "-asym")
        if (bits, strategy, symmetric) == (8, "channel", True):
            mm_type = "int8-weight-only"
        spec = parse(mm_type).weight
        assert spec is not None
        width, signed = int(spec.filled(k) * bits) // 8, bits == 8 and symmetric
        if (self.shape("weight_packed"), k % groups) != ((n, -(-k * bits // 32)), 0) or 4 * -(-k * bits // 32) < width:
            raise self.refuse(f"has packed codes {list(self.shape('weight_packed'))} for a weight {[n, k]}")

        def codes(given: Given) -> Tensor:
            # The words are little-endian, so that their bytes have the bits in the order of the codes.
            found = given[packed].contiguous().view(torch.uint8)[:, :width].contiguous()
            return swapped_sign(found) if signed else found

        leaves = {
            "weight": Made((packed,), codes, "I8" if signed else "U8", (n, width)),
            "weight_scale": Made((scale,), lambda given: given[scale].float().view(n, groups), "F32", (n, groups)),
        }
        if not symmetric:
            zero = self.name("weight_zero_point")
            leaves["weight_zero"] = Made(
                (zero,), lambda given: _unpack_columns(given[zero], bits, n).float(), "F32", (n, groups)
            )
        return mm_type, leaves, n, k

    def _four_bit_floats(self) -> tuple[str, dict[str, Made], int, int]:
        packed, scale = self.name("weight_packed"), self.name("weight_scale")
        kind = self.format.partition("-")[0]
        n, k = self.shape("weight_packed")[0], 2 * self.shape("weight_packed")[1]
        groups = k // (16 if kind == "nvfp4" else 32)
        if self.shape("weight_scale") != (n, groups):
            raise self.refuse(f"has scales {list(self.shape('weight_scale'))} for a weight {[n, k]}")
        leaves = {
            "weight": self.translation.same(packed),
            "weight_scale": self.translation.swizzled(scale, n, groups),
        }
        for leaf in ("weight_global_scale", "input_global_scale") if kind == "nvfp4" else ():
            if leaf == "weight_global_scale" or self.has(leaf):
                leaves[leaf] = self.translation.same(self.name(leaf))
        alone = self._inputs() == "float"
        size = 16 if kind == "nvfp4" else 32
        return f"W-{kind}-group{size}-sym-Auto" if alone else kind, leaves, n, k

    def _bytes(self) -> tuple[str, dict[str, Made], int, int]:
        weight, scale = self.name("weight"), self.name("weight_scale")
        info = self.translation.found.tensors[weight]
        if not self.weights.get("symmetric", True) or self.weights.get("num_bits") != 8 or len(info.shape) != 2:
            raise self.refuse(
                f"is {info.dtype} {list(info.shape)} with weights {dict(self.weights)}", "symmetric, 8 bits"
            )
        key = (info.dtype, str(self.weights.get("strategy")), self._inputs())
        if key not in _TYPES:
            raise self.refuse(f"has {key[0]} weights per {key[1]} and inputs per {key[2]}")
        if key[1] == "block" and list(self.weights.get("block_structure") or ()) != [128, 128]:
            raise self.refuse(f"has blocks {self.weights.get('block_structure')}", "[128, 128]")
        n, k = info.shape
        shape = {"channel": (n, 1), "tensor": (1,)}.get(key[1], self.shape("weight_scale"))
        leaves = {
            "weight": self.translation.same(weight),
            "weight_scale": Made((scale,), lambda given: given[scale].float().reshape(shape), "F32", shape),
        }
        if key[2].startswith("static"):
            given_scale = self.name("input_scale")
            leaves["input_scale"] = Made((given_scale,), lambda given: given[given_scale].float().view(1), "F32", (1,))
        return _TYPES[key], leaves, n, k


_TYPES = {
    ("I8", "channel", "float"): "int8-weight-only",
    ("I8", "channel", "token"): INT8_AFFINE,
    ("I8", "channel", "static tensor"): "int8-static",
    ("F8_E4M3", "channel", "float"): "fp8-weight-only",
    ("F8_E4M3", "tensor", "float"): "fp8-pertensor-weight-only",
    ("F8_E4M3", "block", "float"): "fp8-b128-weight-only",
    ("F8_E4M3", "channel", "token"): "fp8",
    ("F8_E4M3", "tensor", "tensor"): "fp8-pertensor-dynamic",
    ("F8_E4M3", "tensor", "static tensor"): "fp8-pertensor",
    ("F8_E4M3", "block", "group"): "fp8-b128",
}
"""By dtype of the codes, by how the scales of weights are shared and those of inputs."""


def _unpack_columns(packed: Tensor, bits: int, n: int) -> Tensor:
    """int32 [ceil(n * bits / 32), G], packed along the first dimension -> codes from 0, [n, G]."""
    stream = packed.t().contiguous().view(torch.uint8)
    places = torch.arange(8)
    each = (stream.unsqueeze(2) >> places & 1).flatten(1)[:, : n * bits].unflatten(1, (n, bits))
    return (each.int() << torch.arange(bits)).sum(dim=2).t()
