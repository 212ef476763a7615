"""Quanto's files: written by optimum-quanto itself, and by diffusers' QuantoConfig with save_pretrained."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import QuantoConfig, WanTransformer3DModel
from optimum.quanto import QTensor, freeze, qfloat8, qint2, qint4, qint8, quantization_map, quantize
from torch import Tensor

from tests.data.interop.tiny import flux, fresh, save_state, saved, wan, write_example

PACKAGES = ("optimum-quanto",)
# The second layer of a feed-forward of 256 has two groups of 128.
DIRECT = {
    "float8": (wan(width=32), qfloat8),
    "int8": (wan(width=32), qint8),
    "int4": (wan(256), qint4),
    "int2": (wan(256), qint2),
    "flux-int2": (flux(width=32), qint2),
}


def weight_of(layer: Any) -> Tensor:
    return layer.weight.dequantize() if isinstance(layer.weight, QTensor) else layer.weight.detach()


def direct() -> None:
    """quantize, freeze, state_dict, quantization_map: as optimum-quanto's README shows."""
    for variant, (model, weights) in DIRECT.items():
        quantize(model, weights=weights)
        freeze(model)
        folder = fresh("quanto", variant)
        save_state(folder, model, model.state_dict())
        (folder / "quantization_map.json").write_text(json.dumps(quantization_map(model)))
        write_example(folder, model, weight_of, PACKAGES)


def through_diffusers() -> None:
    for weights, width in {"int8": 32, "int4": 64}.items():
        folder = fresh("quanto", f"diffusers-{weights}")
        with saved(wan(256, width)) as source:
            config = QuantoConfig(weights_dtype=weights, modules_to_not_convert=["proj_out"])
            model = WanTransformer3DModel.from_pretrained(source, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(folder)
        write_example(folder, model, weight_of, PACKAGES)


if __name__ == "__main__":
    direct()
    through_diffusers()
