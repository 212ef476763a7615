"""Which scheme and which library each linear layer of a component gets, held against the headers of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightx2v.config.schema import MMRule
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io.weights import Checkpoint, TensorInfo
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, code_bytes, match_rules, plan_layer
from lightx2v.platform import DeviceInfo
from lightx2v.quant.spec import QSpec

#: Names of safetensors dtypes as the headers give them.
FLOAT_DTYPES = {"F32", "F16", "BF16", "F64"}
STORED_DTYPE = {"int8": "I8", "fp8": "F8_E4M3"}


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """One model of the pipeline: where its weights are and how each of its quantizable linears is computed."""

    name: str
    checkpoint: Path
    layers: tuple[LayerPlan, ...]
    auto_quant: bool
    weight_bytes: int
    unused_rules: tuple[MMRule, ...] = ()

    def by_name(self) -> dict[str, LayerPlan]:
        """The plans by layer name, as `swap_linears` takes them."""
        return {layer.name: layer for layer in self.layers}

    def quantized(self) -> dict[str, LayerPlan]:
        """Those of them that are not plain floats."""
        return {layer.name: layer for layer in self.layers if layer.mm_type != "Default"}


def stored_scheme(tensors: Mapping[str, TensorInfo], names: Sequence[str]) -> str:
    """The mm_type that fits how a checkpoint holds the linears `names`: what `mm_type: auto` resolves to."""
    for name in names:
        weight, scale = tensors.get(f"{name}.weight"), tensors.get(f"{name}.weight_scale")
        if weight is None or weight.dtype in FLOAT_DTYPES or scale is None:
            continue
        if weight.dtype == "I8":
            return "int8"
        if weight.dtype == "F8_E4M3":
            return "fp8" if scale.shape[-1] == 1 else "fp8-b128"
    return "Default"


def _check_layer(layer: LayerPlan, tensors: Mapping[str, TensorInfo], auto_quant: bool, where: str) -> None:
    weight = tensors.get(f"{layer.name}.weight")
    if weight is None:
        raise CheckpointError(
            where, f"tensor '{layer.name}.weight' is missing", do="check that this is the right checkpoint"
        )
    if layer.library == "custom":
        return  # a class from outside knows itself what it reads
    shape = (layer.out_features, layer.in_features)
    spec = layer.scheme.weight
    is_float = weight.dtype in FLOAT_DTYPES
    if spec is None:
        if not is_float:
            raise CheckpointError(
                where,
                f"'{weight.name}' holds quantized weights ({weight.dtype}), mm_type '{layer.mm_type}' reads float ones",
                do="give the file as the quantized checkpoint, with the mm_type that made it (or mm_type 'auto')",
            )
    elif spec.dtype not in STORED_DTYPE:
        raise ConfigError(
            "mm_config.mm_type", f"'{layer.mm_type}' cannot be loaded by this version", allowed="int8, fp8, fp8-b128"
        )
    elif is_float and not auto_quant:
        raise CheckpointError(
            where,
            f"'{weight.name}' holds {weight.dtype}, mm_type '{layer.mm_type}' reads {STORED_DTYPE[spec.dtype]}",
            do="convert it first (lightx2v convert --quantized) or set weight_auto_quant to true",
        )
    elif not is_float:
        if weight.dtype != STORED_DTYPE[spec.dtype]:
            raise CheckpointError(
                where,
                f"'{weight.name}' holds {weight.dtype}, mm_type '{layer.mm_type}' reads {STORED_DTYPE[spec.dtype]}",
                do="use the mm_type that the file was made for",
            )
        _check_scale(layer, spec, tensors, where)
    if weight.shape != shape:
        raise CheckpointError(
            where, f"'{weight.name}' has shape {weight.shape}, the model wants {shape}", do="check config.json"
        )


def _check_scale(layer: LayerPlan, spec: QSpec, tensors: Mapping[str, TensorInfo], where: str) -> None:
    wanted = spec.scale_shape(layer.out_features, layer.in_features)
    scale = tensors.get(f"{layer.name}.weight_scale")
    if scale is None:
        raise CheckpointError(
            where,
            f"scale '{layer.name}.weight_scale' is missing",
            do="convert the checkpoint again; without its scales it is lost",
        )
    flat = (layer.out_features,)
    if scale.shape != wanted and not (spec.granularity == "channel" and scale.shape == flat):
        raise CheckpointError(
            where,
            f"scale '{scale.name}' has shape {scale.shape}, mm_type '{layer.mm_type}' wants {wanted}",
            do="use the mm_type that the file was made for",
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
) -> ComponentPlan:
    """Plan every linear in `shapes` (name -> (N, K)) and refuse a checkpoint that does not fit, from its header alone.

    `rename` turns the names in the file into the model's.
    """
    tensors = {rename(name) if rename else name: info for name, info in checkpoint.tensors.items()}
    default = stored_scheme(tensors, list(shapes)) if mm_type == "auto" else mm_type
    types, unused = match_rules(shapes, default, rules)
    layers = tuple(
        plan_layer(layer, types[layer], parse(types[layer]), n, k, device=device, fallback=fallback)
        for layer, (n, k) in shapes.items()
    )
    for layer in layers if check else ():
        _check_layer(layer, tensors, auto_quant, str(path))
    packed = {f"{layer.name}.weight": code_bytes(layer, device) for layer in layers if layer.scheme.weight is not None}
    total = 0
    for tensor_name, tensor in tensors.items():
        width = 4 if tensor_name.endswith("_scale") else dtype_bytes
        total += math.prod(tensor.shape) * packed.get(tensor_name, width)
    return ComponentPlan(name, path, layers, auto_quant, total, tuple(unused))
