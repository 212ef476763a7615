"""Which scheme and which library each linear layer of a component gets, held against the headers of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from lightx2v.config.schema import MMRule
from lightx2v.errors import CheckpointError
from lightx2v.io.comfy import comfy_marks
from lightx2v.io.declared import declared_layers, folded_layers
from lightx2v.io.dtypes import FLOAT_NAMES, HEADER_NAMES, TORCH_DTYPES
from lightx2v.io.gguf import ENDING
from lightx2v.io.weights import Checkpoint, TensorInfo
from lightx2v.mm.scheme import known_scheme, parse
from lightx2v.mm.select import LayerPlan, code_bytes, match_rules, plan_layer
from lightx2v.mm.static import calibrated_leaves
from lightx2v.platform import DeviceInfo
from lightx2v.quant.around import AROUND_LEAVES, around_bytes
from lightx2v.quant.formats import scale_bytes, unmakeable
from lightx2v.quant.layouts import Stored, find_layout, misfit
from lightx2v.quant.spec import GGUF, QSpec, gguf_kind

FLOAT_DTYPES = set(FLOAT_NAMES)
#: What `auto` looks for, in this order.
_TYPES = "int8 fp8 fp8-b128 fp8-pertensor mxfp8 mxfp6-mxfp8 mxfp4 nvfp4 int4-g128 nf4-double".split()


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """One model of the pipeline: where its weights are and how each of its quantizable linears is computed."""

    name: str
    checkpoint: Path
    layers: tuple[LayerPlan, ...]
    auto_quant: bool
    weight_bytes: int
    unused_rules: tuple[MMRule, ...] = ()
    once_bytes: int = 0
    """Of the weights that are read once per request, before its loop, and given up for it."""
    layer_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of each quantized weight with its scales."""
    folded: frozenset[str] = frozenset()
    """Layers that a multiplier went out of or into, by the model's names."""

    @property
    def loop_bytes(self) -> int:
        """Bytes of the weights in the denoising loop."""
        return self.weight_bytes - self.once_bytes

    def by_name(self) -> dict[str, LayerPlan]:
        """The plans by layer name, as `swap_linears` takes them."""
        return {layer.name: layer for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        """What `Plan.to_json` tells of it."""
        return {
            "checkpoint": str(self.checkpoint),
            "weight_bytes": self.loop_bytes,
            "read_once_bytes": self.once_bytes,
            "quantized_at_load": self.auto_quant,
            "layers": [
                {
                    "name": layer.name,
                    "mm_type": layer.mm_type,
                    "library": layer.library,
                    "reason": layer.reason,
                    "shape": [layer.out_features, layer.in_features],
                }
                for layer in self.layers
            ],
            "rules_without_match": [rule.match for rule in self.unused_rules],
        }

    def quantized(self) -> dict[str, LayerPlan]:
        """Those of them that are not plain floats."""
        return {layer.name: layer for layer in self.layers if layer.mm_type != "Default"}

    def read_raw(self) -> frozenset[str]:
        """Tensors, by the model's names, that a .gguf file gives as blocks: the layers dequantize them."""
        return frozenset(f"{layer.name}.weight" for layer in self.layers if _is_gguf(layer))


def stored_type(leaves: Mapping[str, TensorInfo], n: int, k: int, declared: str | None = None) -> str:
    """The mm_type that fits how a checkpoint holds a linear [n, k]: what `mm_type: auto` resolves to.

    `declared` is what the file says of the layer, if anything; it counts where tensors of that kind are there.
    """
    weight = leaves.get("weight")
    if weight is None or weight.dtype in FLOAT_DTYPES:
        return "Default"
    if weight.dtype in GGUF:
        return f"gguf-{weight.dtype}"
    stored = _stored(leaves)
    names = (
        name for name in _candidates(declared, k) if (spec := parse(name).weight) and find_layout(spec, n, k, stored)
    )
    name = next(names, "Default")
    if name == "int8" and "input_scale" in leaves:
        affine = "int8-static-asym" if "input_zero" in leaves else "int8-static"
        return "int8-timestep" if "input_steps" in leaves else affine
    return name


def _candidates(declared: str | None, k: int) -> Iterator[str]:
    """mm_types in the order in which they are tried."""
    if declared is not None and known_scheme(declared) is not None:
        yield declared  # a whole mm_type
    said = known_scheme(f"{declared}-Auto") if declared else None
    if said is not None and said.activation is not None:
        yield said.name
    yield from (name for name in _TYPES if said is None or parse(name).weight == said.weight)
    if said is not None:
        yield said.name
    yield from _TYPES
    for bits, size, kind in product((4, 3, 2, 8), (128, 64, 32, 256, 96, 16), ("", "-asym")):
        if known_scheme(name := f"int{bits}-g{size}{kind}") and not k % size:
            yield name
    yield from (f"int{bits}-channel{kind}" for bits in (4, 3, 2, 8) for kind in ("", "-asym"))


def _stored(leaves: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    """What the headers say, as `quant.layouts` takes it; the bias is no part of the weight."""
    described = {leaf: info for leaf, info in leaves.items() if leaf != "bias"}
    return {
        leaf: Stored(TORCH_DTYPES[info.dtype], info.shape)
        for leaf, info in described.items()
        if info.dtype in TORCH_DTYPES
    }


def _check_layer(layer: LayerPlan, leaves: Mapping[str, TensorInfo], fits: str, auto_quant: bool, where: str) -> None:
    """`fits` is the mm_type that the tensors are stored for."""
    weight = leaves.get("weight")
    if weight is None:
        raise CheckpointError(
            where, f"tensor '{layer.name}.weight' is missing", do="check that this is the right checkpoint"
        )
    if layer.library == "custom":
        return  # a class from outside knows itself what it reads
    spec, shape = layer.scheme.weight, (layer.out_features, layer.in_features)
    is_float, is_blocks = weight.dtype in FLOAT_DTYPES, weight.file.suffix == ENDING
    if (is_float or is_blocks) and weight.shape != shape:
        raise CheckpointError(
            where, f"'{weight.name}' has shape {weight.shape}, the model wants {shape}", do="check config.json"
        )
    if spec is None:
        if not is_float:
            raise CheckpointError(
                where,
                f"'{weight.name}' holds quantized weights ({weight.dtype}), mm_type '{layer.mm_type}' reads float ones",
                do=f"give the file as the quantized checkpoint, with mm_type '{_or_auto(fits)}'",
            )
    elif gguf_kind(spec) and is_blocks:
        if weight.dtype not in GGUF:
            raise CheckpointError(where, f"'{weight.name}' has blocks of {weight.dtype}", allowed=", ".join(GGUF))
    elif is_float:
        _check_float(weight, layer, spec, auto_quant, where)
    elif find_layout(spec, *shape, _stored(leaves)) is None:
        raise CheckpointError(
            where,
            f"not as mm_type '{layer.mm_type}' reads it: {_why(layer, spec, leaves)}",
            do=f"use mm_type '{_or_auto(fits)}'",
        )
    _check_calibrated(layer, leaves, where)


def _or_auto(fits: str) -> str:
    return "auto" if fits == "Default" else fits


def _check_calibrated(layer: LayerPlan, leaves: Mapping[str, TensorInfo], where: str) -> None:
    """Scales of inputs that only a calibration can give must be there, whether the weight is quantized or not."""
    activation = layer.scheme.activation
    if activation is None or not activation.is_calibrated:
        return
    if missing := [leaf for leaf in calibrated_leaves(activation) if leaf not in leaves]:
        raise CheckpointError(
            where,
            f"'{layer.name}.{missing[0]}' is missing, mm_type '{layer.mm_type}' reads the scales of inputs from it",
            do="calibrate the model (lightx2v calibrate), or use mm_type 'int8', which finds them as it runs",
        )


def _why(layer: LayerPlan, spec: QSpec, leaves: Mapping[str, TensorInfo]) -> str:
    unknown = [info for info in leaves.values() if info.dtype not in TORCH_DTYPES]
    if unknown:
        return f"'{unknown[0].name}' is {unknown[0].dtype}"
    size = (spec, layer.out_features, layer.in_features)
    return misfit(*size, _stored(leaves), f"{layer.name}.", HEADER_NAMES.__getitem__)


def _check_float(weight: TensorInfo, layer: LayerPlan, spec: QSpec, auto_quant: bool, where: str) -> None:
    if not auto_quant:
        raise CheckpointError(
            where,
            f"'{weight.name}' holds {weight.dtype}, mm_type '{layer.mm_type}' reads quantized weights",
            do="convert it first (lightx2v convert --quantized) or set weight_auto_quant to true",
        )
    if problem := unmakeable(spec, layer.in_features):
        raise CheckpointError(where, f"'{weight.name}' cannot be quantized to '{layer.mm_type}': {problem}")


def _check_kinds(layers: Sequence[LayerPlan], tensors: Mapping[str, Mapping[str, TensorInfo]], where: str) -> None:
    """A .gguf file mixes kinds of blocks; it must have some of each kind that was named."""
    read = {layer.name: tensors[layer.name]["weight"] for layer in layers if _is_gguf(layer)}
    there = {info.dtype for info in read.values() if info.file.suffix == ENDING}
    for layer in layers:
        kind = gguf_kind(layer.scheme.weight) if layer.scheme.weight else None
        if kind and there and kind not in there:
            raise CheckpointError(
                where,
                f"has blocks of {', '.join(sorted(there))}, mm_type '{layer.mm_type}' names others",
                do="use mm_type 'auto'",
            )


def _is_gguf(layer: LayerPlan) -> bool:
    return layer.scheme.weight is not None and gguf_kind(layer.scheme.weight) is not None


def _check_order(layers: Sequence[LayerPlan], tensors: Mapping[str, Mapping[str, TensorInfo]], where: str) -> None:
    """ComfyUI and NVIDIA ModelOpt give nvfp4 the same names and another order; only marked files are the former's."""
    for layer in layers:
        leaves = tensors[layer.name]
        renamed = leaves["weight"].name != f"{layer.name}.weight"
        if renamed and "weight_scale_2" in leaves and "comfy_quant" not in leaves:
            raise CheckpointError(
                where,
                f"layer '{layer.name}' has a 'weight_scale_2' under a name of diffusers, as NVIDIA ModelOpt exports it",
                allowed="nvfp4 of lightx2v convert, of LightX2V, or of ComfyUI",
                do="convert the unquantized model",
            )


def plan_component(
    name: str,
    checkpoint: Checkpoint,
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rename: Callable[[str], str] | None,
    mm_type: str,
    rules: Sequence[MMRule],
    auto_quant: bool,
    fallback: bool,
    device: DeviceInfo,
    dtype_bytes: int,
    check: bool = True,
    once: Sequence[str] = (),
) -> ComponentPlan:
    """Plan every linear in `shapes` (name -> (N, K)) and refuse a checkpoint that does not fit, from its header alone.

    `rename` turns the names in the file into the model's; `once` are those that the loop does without.
    """
    marks = {name: TensorInfo(name, "U8", (size,), path, size) for name, size in comfy_marks(checkpoint).items()}
    tensors = {rename(name) if rename else name: info for name, info in (dict(checkpoint.tensors) | marks).items()}
    of_layers: dict[str, dict[str, TensorInfo]] = {layer: {} for layer in shapes}
    for tensor_name, info in tensors.items():
        layer_name, _, leaf = tensor_name.rpartition(".")
        if layer_name in of_layers:
            of_layers[layer_name][leaf] = info
    types, unused = match_rules(shapes, mm_type, rules)
    declared = declared_layers(checkpoint.metadata)
    fits = {}
    for layer, (n, k) in shapes.items():
        weight = of_layers[layer].get("weight")
        said = declared.get(weight.name.removesuffix(".weight")) if weight is not None else None
        fits[layer] = stored_type(of_layers[layer], n, k, said)
        if types[layer] == "auto":
            types[layer] = fits[layer]
    layers = tuple(
        plan_layer(layer, types[layer], parse(types[layer]), n, k, device=device, fallback=fallback)
        for layer, (n, k) in shapes.items()
    )
    if check:
        for planned in layers:
            _check_layer(planned, of_layers[planned.name], fits[planned.name], auto_quant, str(path))
        _check_kinds(layers, of_layers, str(path))
        _check_order(layers, of_layers, str(path))
    quantized = {planned.name: planned for planned in layers if planned.scheme.weight is not None}
    packed = {name: _layer_bytes(planned, of_layers[name], device) for name, planned in quantized.items()}
    total = sum(packed.values())
    for tensor_name, info in tensors.items():
        layer_name, _, leaf = tensor_name.rpartition(".")
        if layer_name not in quantized or leaf == "bias":
            total += math.prod(info.shape) * dtype_bytes
    given_up = sum(math.prod(tensors[name].shape) * dtype_bytes for name in once if name in tensors)
    folded = frozenset(rename(layer) if rename else layer for layer in folded_layers(checkpoint.metadata))
    return ComponentPlan(name, path, layers, auto_quant, total, tuple(unused), given_up, packed, folded)


def _layer_bytes(layer: LayerPlan, leaves: Mapping[str, TensorInfo], device: DeviceInfo) -> int:
    """Bytes of a quantized weight with its scales, once its library has packed it."""
    spec, weight = layer.scheme.weight, leaves.get("weight")
    assert spec is not None
    n, k = layer.out_features, layer.in_features
    if _is_gguf(layer) and weight is not None and weight.file.suffix == ENDING:
        return weight.nbytes
    around = around_bytes({leaf: info.shape for leaf, info in leaves.items() if leaf in AROUND_LEAVES})
    return int(n * spec.filled(k) * code_bytes(layer, device)) + scale_bytes(spec, n, k) + around
