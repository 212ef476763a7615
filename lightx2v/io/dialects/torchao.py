"""Files of torchao's tensors, as diffusers' TorchAoConfig saves them (torchao 0.16 and later, `safetensors_support`).

The metadata has, for each weight, JSON that names its class, what it was made with and its parts:

    "<layer>.weight": {"_type": "Int8Tensor", "_data": {"block_size": [1, K], ...}, "_tensor_data_names": [...]}
    <layer>._weight_qdata          int8 or e4m3 codes [N, K]
    <layer>._weight_scale          float32: value = code * scale
    <layer>._weight_zero_point     int8, zeros
    <layer>._weight_act_quant_scale, _weight_act_pre_scale   of a calibrated input
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import INT8_AFFINE, Found, Translation

_PLAIN = "Tensor"
_CODES = {"Int8Tensor": "I8", "Float8Tensor": "F8_E4M3"}


class TorchAO:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        return any(name.endswith("._weight_qdata") for name in found.tensors) or _says_torchao(found)

    def translate(self, found: Found) -> Translation:
        """Int8Tensor and Float8Tensor, with inputs that stay floats or are quantized as they come."""
        translation = Translation(found)
        for name, text in found.checkpoint.metadata.items():
            said = _read(text)
            if said is not None and said["_type"] != _PLAIN:
                _layer(translation, name, said)
        return translation


DIALECT = TorchAO()


def _says_torchao(found: Found) -> bool:
    """Other classes of its tensors have other parts."""
    return found.config.get("quant_method") == "torchao" and "tensor_names" in found.checkpoint.metadata


def _read(text: str) -> dict[str, Any] | None:
    """What the metadata says of one tensor; None for another entry."""
    try:
        said = json.loads(text)
    except ValueError:
        return None
    return said if isinstance(said, dict) and isinstance(said.get("_type"), str) else None


@dataclass(frozen=True)
class _Weight:
    """A weight [n, k], its parts by torchao's names, and what its class keeps."""

    found: Found
    name: str
    kind: str
    data: dict[str, Any]
    parts: dict[str, str]
    n: int
    k: int

    @property
    def layer(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def act(self) -> dict[str, Any] | None:
        """How inputs are quantized."""
        act = self.data.get("act_quant_kwargs")
        return act.get("_data", act) if isinstance(act, dict) else None

    def refuse(self, what: str, allowed: str = "") -> CheckpointError:
        return self.found.refuse(f"'{self.name}' is a {self.kind} {what}", allowed, "quantize it in another way")


def _layer(translation: Translation, name: str, said: dict[str, Any]) -> None:
    found, kind = translation.found, said["_type"]
    if kind not in _CODES:
        raise found.refuse(f"'{name}' is a {kind} of torchao", ", ".join(_CODES), "quantize it in another way")
    prefix, _, leaf = name.rpartition(".")
    parts = {part: f"{prefix}._{leaf}_{part}" for part in said.get("_tensor_data_names", ())}
    for part in ("qdata", "scale"):
        if parts.get(part) not in found.tensors:
            raise found.refuse(f"'{prefix}._{leaf}_{part}' is missing", do="check that the file is whole")
    info = found.tensors[parts["qdata"]]
    if info.dtype != _CODES[kind] or len(info.shape) != 2 or leaf != "weight":
        raise found.refuse(f"'{info.name}' is {info.dtype} {list(info.shape)}", f"{_CODES[kind]} of linear layers")
    n, k = info.shape
    weight = _Weight(found, name, kind, dict(said.get("_data") or {}), parts, n, k)
    mm_type, scale_shape = _scheme(weight)
    scale = parts["scale"]
    leaves = {
        "weight": translation.same(parts["qdata"]),
        "weight_scale": Made((scale,), lambda given: given[scale].float().reshape(scale_shape), "F32", scale_shape),
    }
    if (zero := parts.get("zero_point")) in found.tensors:
        assert zero is not None
        leaves["weight"] = leaves["weight"]._replace(
            needs=(parts["qdata"], zero), make=lambda given: _symmetric(weight, given, zero)
        )
    for part, ours, shape in (("act_quant_scale", "input_scale", (1,)), ("act_pre_scale", "input_multiplier", (k,))):
        if (stored := parts.get(part)) in found.tensors:
            assert stored is not None
            leaves[ours] = _reshaped(stored, shape)
    translation.take(*(part for part in parts.values() if part in found.tensors))
    translation.layer(weight.layer, mm_type, leaves, n, k)


def _reshaped(stored: str, shape: tuple[int, ...]) -> Made:
    return Made((stored,), lambda given: given[stored].float().reshape(shape), "F32", shape)


def _symmetric(weight: _Weight, given: Given, zero: str) -> Tensor:
    if bool(given[zero].any()):
        raise weight.refuse("with zero points", "symmetric codes")
    return given[weight.parts["qdata"]]


def _scheme(weight: _Weight) -> tuple[str, tuple[int, ...]]:
    """The mm_type, and the shape of its scales."""
    n, k = weight.n, weight.k
    block = weight.data.get("block_size")
    granularities = {(1, k): "channel", (n, k): "tensor", (128, 128): "block"}
    sized = tuple(block) if isinstance(block, list) else ()
    granularity = granularities.get(sized)
    groups = weight.kind == "Int8Tensor" and len(sized) == 2 and sized[0] == 1 and k % sized[1] == 0
    if granularity is None and not groups:
        raise weight.refuse(f"with scales of blocks {block}", "[1, K], [N, K], or [128, 128] of float8")
    if granularity is None:
        if weight.act is not None:
            raise weight.refuse("in groups with quantized inputs", "float inputs")
        return f"int8-g{sized[1]}", (n, k // sized[1])
    shape = {"channel": (n, 1), "tensor": (1,), "block": (-(-n // 128), -(-k // 128))}[granularity]
    key = (weight.kind, granularity, _inputs(weight))
    mm_type = _TYPES.get(key)
    if mm_type is None:
        raise weight.refuse(f"of scales per {granularity} with {key[2]} inputs")
    return mm_type, shape


_TYPES = {
    ("Int8Tensor", "channel", "float"): "int8-weight-only",
    ("Int8Tensor", "channel", "token"): INT8_AFFINE,
    ("Int8Tensor", "channel", "static"): "int8-static",
    ("Float8Tensor", "channel", "float"): "fp8-weight-only",
    ("Float8Tensor", "tensor", "float"): "fp8-pertensor-weight-only",
    ("Float8Tensor", "block", "float"): "fp8-b128-weight-only",
    ("Float8Tensor", "channel", "token"): "fp8",
    ("Float8Tensor", "tensor", "tensor"): "fp8-pertensor-dynamic",
    ("Float8Tensor", "block", "group"): "fp8-b128",
}
"""By class, by how the scales of weights are shared and those of inputs."""


def _inputs(weight: _Weight) -> str:
    """How scales of inputs are shared: "float" where they are not quantized."""
    if weight.act is None:
        return "float"
    mapping = weight.act.get("mapping_type")
    named = mapping.get("_data") if isinstance(mapping, dict) else mapping
    if named not in ("SYMMETRIC", None):
        raise weight.refuse(f"with {named} inputs", "SYMMETRIC ones")
    if weight.parts.get("act_quant_scale") in weight.found.tensors:
        return "static"
    shared = weight.act.get("granularity")
    kind = shared.get("_type") if isinstance(shared, dict) else shared
    return {"PerRow": "token", "PerTensor": "tensor", "PerBlock": "group"}.get(str(kind), str(kind))
