"""AngelSlim's two files, as `io.dialects.angelslim` reads them: fp8 weights, each under one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightx2v.convert.exports.base import DIT_FILE, MODEL_FILE, Exported, Layer, Written
from lightx2v.io.derived import Made
from lightx2v.io.dialects.angelslim import SCALES
from lightx2v.io.weights import write_safetensors
from lightx2v.quant.spec import FP8_TENSOR, FP8_TENSOR_DYNAMIC

_SCALE = ".weight_scale"


class AngelSlim:
    """The writer."""

    held = "fp8 weights with one scale each, and inputs quantized as they come (fp8-pertensor, fp8-pertensor-dynamic)"

    def layer(self, layer: Layer) -> Exported:
        if layer.scheme.weight != FP8_TENSOR or layer.scheme.activation not in (FP8_TENSOR, FP8_TENSOR_DYNAMIC):
            raise layer.refuse()
        return Exported(
            "fp8-per-tensor",
            {
                f"{layer.name}.weight": layer.same("weight"),
                f"{layer.name}{_SCALE}": one_scale(layer),
                **layer.bias(),
            },
        )

    def beside(self) -> Mapping[str, Made]:
        return {}

    def file(self, name: str, is_dit: bool, kinds: Mapping[str, str]) -> str:
        return DIT_FILE if is_dit else MODEL_FILE

    def describe(self, written: Written) -> None:
        """The scales once more."""
        scales = {name: tensor.clone() for name, tensor in written.tensors.stream(_scales(written))}
        write_safetensors(written.path.with_name(SCALES), scales, {"format": "pt"})


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
