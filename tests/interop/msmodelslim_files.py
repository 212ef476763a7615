"""Files as msModelSlim 26.1 writes them, made here: the package itself runs on Ascend NPUs.

Names, dtypes and formulas are those of its `complex_quantifier.py` and `mindie_format.py`, apart from the reader's.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale [N, 1], symmetric per output channel."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def dynamic(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    codes, scale = int8_weight(weight)
    return {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale), "bias": bias}


def static(
    weight: Tensor, bias: Tensor, scale: Tensor, offset: Tensor, *, legacy: bool, half: bool = False
) -> dict[str, Tensor]:
    """W8A8, and of stacked scales [T] W8A8_TIMESTEP; `half` stores deq_scale as of fp16 models."""
    codes, weight_scale = int8_weight(weight)
    deq = scale.view(-1, 1) * weight_scale.view(1, -1)
    correction = codes.float().sum(dim=1).view(1, -1) * offset.view(-1, 1)
    folded = (bias.view(1, -1) / deq - correction).round().to(torch.int32)
    deq = deq.view(torch.int32).to(torch.int64) if half else deq
    stacked = scale.numel() > 1
    found = {
        "weight": codes,
        "input_scale": scale,
        "input_offset": offset,
        "deq_scale": deq if stacked else deq[0],
        "quant_bias": folded if stacked else folded[0],
        "bias": bias,
    }
    offsets = {"weight_scale": weight_scale, "weight_offset": torch.zeros_like(weight_scale)}
    return found | (offsets if legacy else {})


def weight_only(weight: Tensor, bias: Tensor, groups: int) -> dict[str, Tensor]:
    """W8A16 with an offset for each of so many groups of a row."""
    parts = weight.unflatten(1, (groups, -1))
    low, high = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
    scale = (high - low) / 255
    offset = (-low / scale - 128).round()
    codes = (parts / scale + offset).round().clamp(-128, 127).to(torch.int8).flatten(1)
    return {"weight": codes, "weight_scale": scale.squeeze(2), "weight_offset": offset.squeeze(2), "bias": bias}


def mx(weight: Tensor, bias: Tensor, bits: int) -> dict[str, Tensor]:
    """W8A8_MXFP8 or W4A4_MXFP4: shared exponents of 32 values, biased by 127."""
    parts = weight.unflatten(1, (-1, BLOCK))
    largest = 448.0 if bits == 8 else 6.0
    exponent = (parts.abs().amax(dim=2, keepdim=True) / largest).log2().ceil()
    scaled = (parts / exponent.exp2()).flatten(1)
    scale = (exponent.squeeze(2) + 127).to(torch.uint8)
    if bits == 8:
        return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scale, "bias": bias}
    index = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(dim=-1) + (torch.signbit(scaled).long() << 3)
    pairs = index.unflatten(1, (-1, 2))
    return {"weight": (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), "weight_scale": scale, "bias": bias}


def write(
    folder: Path, floats: dict[str, Tensor], layers: dict[str, tuple[str, dict[str, Tensor]]], named: str = "w8a8"
) -> Path:
    """A model of float tensors and quantized layers, each with its type; returns the weights."""
    tensors, said = dict(floats), dict.fromkeys(floats, "FLOAT")
    for layer, (kind, leaves) in layers.items():
        for leaf, tensor in leaves.items():
            tensors[f"{layer}.{leaf}"] = tensor.contiguous()
            said[f"{layer}.{leaf}"] = "FLOAT" if leaf in ("bias", "mul_scale") or leaf.startswith("svd") else kind
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"quant_model_weight_{named}.safetensors"
    save_file(tensors, path)
    description = folder / f"quant_model_description_{named}.json"
    description.write_text(json.dumps({"model_quant_type": named.upper(), **said}))
    return path
