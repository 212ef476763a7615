"""bitsandbytes' 4-bit and 8-bit layers in a transformer of diffusers, and their own state dict.

diffusers' BitsAndBytesConfig refuses CPUs, so its exchange of layers is done here: every linear layer, but for modules
that diffusers keeps in float32.
"""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from tests.data.interop.tiny import exchange_linears, flux, fresh, save_state, wan, write_example

KEEP = {"wan": ("time_embedder",), "flux": ()}


def four_bits(kind: str, double: bool) -> Any:
    def made(linear: nn.Linear) -> nn.Module:
        if linear.in_features % 64:
            # With AVX512, version 0.50.2 dequantizes rows that blocks of 64 do not divide wrongly.
            return linear
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            compute_dtype=torch.float32,
            compress_statistics=double,
            quant_type=kind,
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=double, quant_type=kind
        )
        layer.bias = nn.Parameter(linear.bias.data)
        # Without gradients the package multiplies in bfloat16 where the CPU can, whatever compute_dtype says.
        layer.support_avx512bf16_for_cpu = False
        return layer.to("cpu")

    return made


def eight_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = nn.Parameter(linear.bias.data)
    return layer.to("cpu")


def weight_of(layer: Any) -> Tensor:
    if type(layer) is nn.Linear:
        return layer.weight.detach()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        # The first forward pass has moved codes and scales from the weight to the state.
        return layer.weight.data.float() * (layer.state.SCB / 127).view(-1, 1)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def described(eight: bool, kind: str = "fp4", double: bool = False) -> dict[str, Any]:
    """What diffusers writes into config.json of such a model."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": eight,
        "load_in_4bit": not eight,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }


if __name__ == "__main__":
    models = {"flux-nf4-double": flux, "nf4": wan, "fp4": wan, "int8": wan}
    for variant, build in models.items():
        eight = variant == "int8"
        model = wan(width=32) if eight else build()
        kind, double = variant.removeprefix("flux-").partition("-")[0], variant.endswith("double")
        exchange_linears(model, eight_bits if eight else four_bits(kind, double), KEEP[build.__name__])
        model.eval()  # the new layers, too: in training, 8-bit ones do not quantize their inputs
        folder = fresh("bitsandbytes", variant)
        save_state(folder, model, model.state_dict())
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = described(eight) if eight else described(eight, kind, double)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        write_example(folder, model, weight_of, ("bitsandbytes",))
