"""optimum-quanto's files, as `io.dialects.quanto` reads them: weights of 8, 4 and 2 bits, and a map of their types."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lightx2v.convert.exports.base import DIT_FILE, MODEL_FILE, Exported, Layer, Written, last_codes
from lightx2v.io.derived import Made
from lightx2v.io.dialects.quanto import MAPS
from lightx2v.io.files import whole_file
from lightx2v.quant.integers import group_count
from lightx2v.quant.quanto import group_size, written_weight

_TYPES = {"int8": "qint8", "fp8": "qfloat8", "int4": "qint4", "int2": "qint2"}
_ONES = ("input_scale", "output_scale")
"""Of activations: quanto has them in its state dicts, as ones, where none are quantized."""


class Quanto:
    """The writer. The map says that inputs stay floats: that they were quantized as they came is in no tensor."""

    held = (
        "int8 and fp8 weights with one scale a row, int4 and int2 ones with zero points in groups of 128 (or of 96, "
        "64, 32, or rows, as Quanto chooses by K), and no scales of inputs"
    )

    def layer(self, layer: Layer) -> Exported:
        spec, weight = layer.spec, f"{layer.name}.weight"
        if spec.is_integer:
            tensors = self._few_bits(layer, weight)
        elif spec.granularity == "channel" and (layer.scheme.activation is None or layer.scheme.activation.dynamic):
            shape = (layer.n, 1)
            scale = layer.stored["weight_scale"]
            tensors = {
                f"{weight}._data": layer.same("weight"),
                f"{weight}._scale": layer.made(
                    lambda given: given["weight_scale"].reshape(shape), scale.dtype, shape, "weight_scale"
                ),
            }
        else:
            raise layer.refuse()
        ones = {f"{layer.name}.{leaf}": Made((), lambda given: torch.ones(()), "F32", ()) for leaf in _ONES}
        return Exported(_TYPES[spec.dtype], {**tensors, **ones, **layer.bias()})

    def _few_bits(self, layer: Layer, weight: str) -> dict[str, Made | str]:
        spec, n, k = layer.spec, layer.n, layer.k
        if spec.dtype not in ("int4", "int2") or spec.symmetric or spec.size != group_size(k):
            raise layer.refuse(f"where K is {k}")
        rows = n * group_count(spec, k)
        packed = -(-rows * int(spec.bits or 8) // 8)
        shapes = {"_data._data": (packed, n * k // rows), "_scale": (rows, 1), "_shift": (rows, 1)}

        def made(leaf: str) -> Made:
            def make(given: Mapping[str, Tensor]) -> Tensor:
                leaves = {name: tensor if name == "weight" else tensor.float() for name, tensor in given.items()}
                if leaf == "_data._data":
                    layer.check_whole(last_codes(leaves["weight"], spec), leaves["weight_zero"][:, -1])
                return written_weight(leaves, spec, k, torch.float32)[leaf]

            dtype = "U8" if leaf == "_data._data" else "F32"
            return layer.made(make, dtype, shapes[leaf], "weight", "weight_scale", "weight_zero")

        return {f"{weight}.{leaf}": made(leaf) for leaf in shapes}

    def beside(self, kinds: Mapping[str, str]) -> Mapping[str, Made]:
        return {}

    def file(self, name: str, is_dit: bool, kinds: Mapping[str, str]) -> str:
        return DIT_FILE if is_dit else MODEL_FILE

    def describe(self, written: Written) -> None:
        """The types of the layers."""
        types = {layer: {"weights": kind, "activations": "none"} for layer, kind in written.kinds.items()}
        with whole_file(written.path.with_name(MAPS[0])) as temporary:
            temporary.write_text(json.dumps(types, indent=4), "utf-8")


EXPORT = Quanto()
