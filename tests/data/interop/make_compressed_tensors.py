"""compressed-tensors' formats of a transformer of diffusers, with scales from its own rule and no calibration data."""

from __future__ import annotations

import json
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_args import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from tests.data.interop.tiny import fresh, save_state, wan, write_example


def in_groups(symmetric: bool) -> QuantizationScheme:
    """int4 in groups of 32: all but the embedding of text divide into them."""
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=symmetric)
    return QuantizationScheme(targets=["Linear"], weights=args)


SCHEMES = {
    "int4-g32": in_groups(True),
    "int4-g32-asym": in_groups(False),
    "int8-channel": preset_name_to_scheme("W8A8", ["Linear"]),
    "float8-dynamic": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
    "nvfp4-weight-only": preset_name_to_scheme("NVFP4A16", ["Linear"]),
}


@torch.no_grad()
def find_scales(layer: Any) -> None:
    args, weight = layer.quantization_scheme.weights, layer.weight
    groups = weight.unflatten(1, (-1, args.group_size)) if args.group_size else weight.unsqueeze(1)
    low, high, whole = groups.amin(2), groups.amax(2), None
    if args.strategy == "tensor_group":
        whole = generate_gparam(weight.amin(), weight.amax())
        layer.weight_global_scale.copy_(whole)
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    layer.weight_scale.copy_(scale)
    layer.weight_zero_point.copy_(zero)


def weight_of(layer: Any) -> Tensor:
    if getattr(layer, "quantization_scheme", None) is None:
        return layer.weight.detach()
    return fake_quantize(
        layer.weight,
        scale=layer.weight_scale,
        zero_point=layer.weight_zero_point,
        args=layer.quantization_scheme.weights,
        global_scale=getattr(layer, "weight_global_scale", None),
    )


if __name__ == "__main__":
    for variant, scheme in SCHEMES.items():
        alone = scheme.input_activations is None
        model = wan() if alone else wan(width=32)
        ignored = ["re:.*_embedder.linear.*"] if alone else ["re:condition_embedder.*", "proj_out"]
        apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignored))
        for layer in model.modules():
            if getattr(layer, "quantization_scheme", None) is not None:
                find_scales(layer)
        folder = fresh("compressed_tensors", variant)
        # The model that rounds as it runs is the package's own meaning of the file.
        write_example(folder, model, weight_of, ("compressed-tensors",))
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        save_state(folder, model, model.state_dict())
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = compressor.quantization_config.model_dump(mode="json")
        (folder / "config.json").write_text(json.dumps(config, indent=2))
