"""AngelSlim's two files, as `io.dialects.angelslim` reads them: fp8 weights, and their scales once more.

AngelSlim itself exports and loads weights under one scale each (fp8-per-tensor). The files of its other types are those
of `lightx2v.integrations.angelslim`: the metadata of the second one says what they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from lightx2v.convert.exports.base import DIT_FILE, MODEL_FILE, Exported, Layer, Written
from lightx2v.errors import CheckpointError
from lightx2v.io.declared import KEY
from lightx2v.io.derived import Made
from lightx2v.io.dialects.angelslim import SCALES
from lightx2v.io.weights import write_safetensors
from lightx2v.mm.scheme import parse
from lightx2v.quant.spec import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TENSOR_DYNAMIC,
    FP8_TOKEN,
    QSpec,
)

_SCALE = ".weight_scale"


_OWN = "fp8-per-tensor"
"""What AngelSlim reads by itself."""


class AngelSlim:
    """The writer."""

    held = (
        "fp8 weights with one scale each (fp8-pertensor, fp8-pertensor-dynamic, fp8-pertensor-weight-only), with one "
        "for a row (fp8) or one for 128 x 128 (fp8-b128), and inputs quantized as they come; one of these in a file"
    )

    def layer(self, layer: Layer) -> Exported:
        kind = _kind(layer)
        rows = {"channel": (layer.n, 1), "block": layer.spec.scale_shape(layer.n, layer.k)}
        whole = layer.spec.granularity == "tensor"
        scale = one_scale(layer) if whole else layer.floats("weight_scale", rows[layer.spec.granularity])
        tensors = {f"{layer.name}.weight": layer.same("weight"), f"{layer.name}{_SCALE}": scale, **layer.bias()}
        return Exported(kind, tensors)

    def beside(self, kinds: Mapping[str, str]) -> Mapping[str, Made]:
        return {}

    def file(self, name: str, is_dit: bool, kinds: Mapping[str, str]) -> str:
        if len(found := sorted(set(kinds.values()))) > 1:
            raise CheckpointError(
                name, f"its layers are {' and '.join(found)}", allowed="one of them", do="convert with one mm_type"
            )
        return DIT_FILE if is_dit else MODEL_FILE

    def describe(self, written: Written) -> None:
        """The scales once more, and what they are where AngelSlim has no file of such."""
        kind = next(iter(written.kinds.values()))
        said = {"quant_type": kind, "layers": dict.fromkeys(written.kinds, _MM_TYPES[kind])}
        metadata = {"format": "pt"} | ({} if kind == _OWN else {KEY: json.dumps(said)})
        scales = {name: tensor.clone() for name, tensor in written.tensors.stream(_scales(written))}
        write_safetensors(written.path.with_name(SCALES), scales, metadata)


_TYPES: dict[tuple[QSpec | None, QSpec | None], str] = {
    (FP8_TENSOR, FP8_TENSOR): _OWN,
    (FP8_TENSOR, FP8_TENSOR_DYNAMIC): _OWN,
    (FP8_TENSOR, None): "fp8-per-tensor-weight-only",
    (FP8_CHANNEL, FP8_TOKEN): "fp8-per-token",
    (FP8_BLOCK128, FP8_GROUP128): "fp8-per-block",
}
_MM_TYPES = {
    "fp8-per-tensor-weight-only": "fp8-pertensor-weight-only",
    "fp8-per-token": "fp8",
    "fp8-per-token-sgl": f"{parse('fp8').name}-ActSgl",
    "fp8-per-block": "fp8-b128",
    _OWN: "fp8-pertensor-dynamic",
}


def _kind(layer: Layer) -> str:
    kind = _TYPES.get(layer.scheme.numerics)
    if kind is None:
        raise layer.refuse()
    return f"{kind}-sgl" if kind == "fp8-per-token" and layer.scheme.act_library == "sgl" else kind


def _scales(written: Written) -> list[str]:
    return [f"{layer}{_SCALE}" for layer in written.kinds]


def one_scale(layer: Layer) -> Made:
    """The scale of the whole weight, float32 []. Raises CheckpointError where rows have their own."""
    leaf = "scale_weight" if "scale_weight" in layer.stored else "weight_scale"
    shape = layer.stored[leaf].shape
    if math.prod(shape) != 1:
        raise layer.refuse(f"stored with scales {list(shape)}")
    return layer.floats(leaf, ())


EXPORT = AngelSlim()
