"""msModelSlim's files, as `io.dialects.msmodelslim` reads them: weights, and JSON that names the type of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightx2v.convert.exports.base import Exported, Layer, Written, last_codes
from lightx2v.io.derived import Made
from lightx2v.io.dialects.msmodelslim import DESCRIPTION, FLOAT, INNER, LOW_RANK, MULTIPLIER, WEIGHTS
from lightx2v.io.files import whole_file
from lightx2v.quant.packing import unswizzle
from lightx2v.quant.spec import (
    INT8_CHANNEL,
    INT8_STATIC,
    INT8_STATIC_ASYM,
    INT8_STEPS,
    INT8_TOKEN,
    MXFP4,
    MXFP4_DYNAMIC,
    MXFP8,
    MXFP8_DYNAMIC,
)

Given = Mapping[str, Tensor]
Tensors = dict[str, Made]
_FLOATS = ("bias", "mul_scale", *LOW_RANK)
"""What is of type FLOAT in a quantized layer."""


class MsModelSlim:
    """The writer."""

    held = (
        "int8 rows with inputs quantized per token (W8A8_DYNAMIC), by one stored scale (W8A8), by one from the middle "
        "of the steps on (W8A8_TIMESTEP) or not at all (W8A16, groups with zero points too), mxfp8 and mxfp4; with or "
        "without input_multiplier and low-rank branches"
    )

    def layer(self, layer: Layer) -> Exported:
        kind, tensors = self._quantized(layer)
        around = [ours for ours in LOW_RANK.values() if ours in layer.stored]
        if len(around) == len(LOW_RANK):
            kind += "_SVD"
            tensors |= {theirs: layer.same(ours) for theirs, ours in LOW_RANK.items()}
        inner = layer.name
        beside: dict[str, Made | str] = {}
        if "input_multiplier" in layer.stored:
            inner = layer.name + INNER
            beside[layer.name + MULTIPLIER] = layer.floats("input_multiplier", (layer.k,))
        named = {f"{inner}.{leaf}": made for leaf, made in tensors.items()}
        return Exported(kind, {**named, **beside, **layer.bias(inner)})

    def _quantized(self, layer: Layer) -> tuple[str, Tensors]:
        weight, activation = layer.scheme.numerics
        if weight == INT8_CHANNEL and activation == INT8_TOKEN:
            return "W8A8_DYNAMIC", _per_channel(layer)
        if weight == INT8_CHANNEL and activation in (INT8_STATIC, INT8_STATIC_ASYM):
            return "W8A8", _static(layer)
        if weight == INT8_CHANNEL and activation == INT8_STEPS:
            return "W8A8_TIMESTEP", _timestep(layer)
        if weight == INT8_CHANNEL and activation is None:
            return "W8A16", _per_channel(layer)
        if activation is None and layer.spec.dtype == "int8" and not layer.spec.symmetric:
            return "W8A16", _with_offsets(layer)
        if (weight, activation) == (MXFP8, MXFP8_DYNAMIC):
            return "W8A8_MXFP8", _blocks(layer, "F8_E4M3", lambda codes: codes[:, -1].view(torch.uint8))
        if (weight, activation) == (MXFP4, MXFP4_DYNAMIC):
            return "W4A4_MXFP4", _blocks(layer, "U8", lambda codes: codes[:, -1] >> 4)
        raise layer.refuse()

    def beside(self, kinds: Mapping[str, str]) -> Mapping[str, Made]:
        return {}

    def file(self, name: str, is_dit: bool, kinds: Mapping[str, str]) -> str:
        return f"{WEIGHTS}_{_main(kinds).lower()}.safetensors"

    def describe(self, written: Written) -> None:
        """The type of each tensor."""
        main = _main(written.kinds)
        said = {"model_quant_type": main}
        for name in written.tensors.tensors:
            owner, leaf = written.owners.get(name), name.rpartition(".")[2]
            said[name] = FLOAT if owner is None or leaf in _FLOATS else written.kinds[owner]
        with whole_file(written.path.with_name(f"{DESCRIPTION}_{main.lower()}.json")) as temporary:
            temporary.write_text(json.dumps(said, indent=2), "utf-8")


EXPORT = MsModelSlim()


def _main(kinds: Mapping[str, str]) -> str:
    """The type that most layers have."""
    return Counter(kinds.values()).most_common(1)[0][0]


def _per_channel(layer: Layer) -> Tensors:
    shape = (layer.n, 1)
    return {
        "weight": layer.same("weight"),
        "weight_scale": layer.floats("weight_scale", shape),
        "weight_offset": Made((), lambda given: torch.zeros(shape), "F32", shape),
    }


def _static(layer: Layer) -> Tensors:
    """Inputs by a stored scale: with what its kernels add to their int32 sums, and multiply these by."""
    if layer.stored["input_scale"].shape not in ((), (1,), (1, 1)):
        raise layer.refuse(f"with {list(layer.stored['input_scale'].shape)} scales of its input")
    return _with_input(layer, ())


def _timestep(layer: Layer) -> Tensors:
    """The same, an entry for each step. The file does not say from which on they hold: its readers take the middle."""
    steps, *first = layer.load(layer.stored["input_steps"].name).flatten().tolist()
    if first != [steps // 2]:
        raise layer.refuse(f"with scales of its input from the steps {first} of {steps} on, not from the middle")
    tensors = _with_input(layer, ("input_steps",))
    for leaf in ("input_scale", "input_offset", "deq_scale", "quant_bias"):
        tensors[leaf] = _stacked(tensors[leaf], steps)
    return tensors


def _stacked(one: Made, steps: int) -> Made:
    """[N] -> [T, N], [1] -> [T]."""
    shape = (steps,) if one.shape == (1,) else (steps, *one.shape)
    return one._replace(make=lambda given: one.make(given).expand(shape).contiguous(), shape=shape)


def _with_input(layer: Layer, read: tuple[str, ...]) -> Tensors:
    """The tensors of a stored scale; `read` are those of the source that others are made by."""
    n = layer.n
    zero = ("input_zero",) if "input_zero" in layer.stored else ()
    bias = ("bias",) if "bias" in layer.stored else ()

    def deq(given: Given) -> Tensor:
        return given["input_scale"].float().reshape(()) * given["weight_scale"].float().reshape(n)

    def quant_bias(given: Given) -> Tensor:
        added = given["bias"].double() / deq(given).double() if bias else torch.zeros(n, dtype=torch.float64)
        moved = (
            given["weight"].sum(dim=1, dtype=torch.int64) * given["input_zero"].double().reshape(()) if zero else 0.0
        )
        return (added - moved).round().to(torch.int32)

    offset = layer.floats("input_zero", (1,)) if zero else Made((), lambda given: torch.zeros(1), "F32", (1,))
    return {
        **_per_channel(layer),
        "input_scale": layer.made(
            lambda given: given["input_scale"].float().reshape(1), "F32", (1,), "input_scale", *read
        ),
        "input_offset": offset,
        "deq_scale": layer.made(deq, "F32", (n,), "input_scale", "weight_scale"),
        "quant_bias": layer.made(quant_bias, "I32", (n,), "input_scale", "weight_scale", "weight", *zero, *bias),
    }


def _with_offsets(layer: Layer) -> Tensors:
    """Codes and zero points of uint8 as ones of int8."""
    n, k, spec = layer.n, layer.k, layer.spec
    scales = spec.scale_shape(n, k)

    def codes(given: Given) -> Tensor:
        if spec.size:
            layer.check_whole(last_codes(given["weight"], spec), given["weight_zero"].float()[:, -1])
        return (given["weight"] ^ 128).view(torch.int8)

    return {
        "weight": layer.made(codes, "I8", (n, k), "weight", "weight_zero"),
        "weight_scale": layer.floats("weight_scale", scales),
        "weight_offset": layer.made(lambda given: given["weight_zero"].float() - 128, "F32", scales, "weight_zero"),
    }


def _blocks(layer: Layer, dtype: str, last: Callable[[Tensor], Tensor]) -> Tensors:
    """MX formats: the scales in the order of rows, as bytes."""
    shape, stored = layer.spec.scale_shape(layer.n, layer.k), layer.stored["weight_scale"].shape

    def codes(given: Given) -> Tensor:
        layer.check_whole(last(given["weight"]))
        return given["weight"].view(torch.float8_e4m3fn if dtype == "F8_E4M3" else torch.uint8)

    def scales(given: Given) -> Tensor:
        held = given["weight_scale"].view(torch.uint8)
        return held if stored == shape else unswizzle(held, *shape)

    return {
        "weight": layer.made(codes, dtype, layer.stored["weight"].shape, "weight"),
        "weight_scale": layer.made(scales, "U8", shape, "weight_scale"),
    }
