"""What stored tensors mean, in float64 and from the documents of the formats, without the engine's own code."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
import torch
from torch import Tensor

from lightx2v.quant.codebook import NF4_VALUES
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import QSpec


def small_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The number of a code of the OCP formats e2m1 and e3m2 (no infinities, no NaN)."""
    mantissa = code % 2**mantissa_bits
    exponent = code // 2**mantissa_bits % 2**exponent_bits
    sign = -1.0 if code // 2 ** (mantissa_bits + exponent_bits) else 1.0
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 0:
        return sign * mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


E2M1 = np.array([small_float(code, 2, 1) for code in range(16)])
E3M2 = np.array([small_float(code, 3, 2) for code in range(64)])


def bits(packed: Tensor, width: int) -> np.ndarray:
    """Codes of `width` bits from a row of bytes, lowest bits first."""
    stream = np.unpackbits(packed.cpu().numpy(), axis=1, bitorder="little")
    codes = stream.reshape(packed.shape[0], -1, width)
    return (codes * 2 ** np.arange(width)).sum(axis=2)


NF4 = np.array(
    [
        *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
        *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
    ]
)
"""To four digits, as QLoRA's paper has them."""
FP4 = np.array([sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)])


def elements(weight: Tensor, spec: QSpec) -> np.ndarray:
    dtype, width = spec.dtype, int(spec.bits or 8)
    if dtype in ("fp8", "mxfp8") or (dtype == "int8" and spec.symmetric):
        return weight.cpu().double().numpy()
    codes = bits(weight, width)
    if dtype.startswith("int"):
        return codes - (2.0 ** (width - 1) if spec.symmetric else 0.0)
    if dtype.startswith("nf4"):
        # The definition has more digits than the paper prints: they are checked against it, and taken.
        assert np.abs(np.array(NF4_VALUES) - NF4).max() < 1e-4
        return np.array(NF4_VALUES)[codes]
    return {"mxfp6": E3M2, "fp4": FP4, "fp4_double": FP4}.get(dtype, E2M1)[codes]


def scales(scale: Tensor, spec: QSpec, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each element."""
    if scale.dtype == torch.float8_e8m0fnu:
        values = 2.0 ** (scale.view(torch.uint8).cpu().double().numpy() - 127)
    else:
        values = scale.cpu().double().numpy()
    if spec.granularity == "block":
        values = values.repeat(spec.size, axis=0)[: shape[0]]
    return values.repeat(spec.size, axis=1)[:, : shape[1]] if spec.size else values


def weight_values(leaves: Mapping[str, Tensor], spec: QSpec) -> Tensor:
    """The weight [N, K], K filled up to whole groups where packed, that `quantize_leaves` made."""
    if spec.dtype.startswith("gguf_"):
        kind = gguf.GGMLQuantizationType(int(leaves["weight_type"]))
        raw = leaves["weight"].cpu().numpy()
        if kind.name in ("F32", "F16"):
            raw = raw.view({"F32": np.float32, "F16": np.float16}[kind.name])
        return torch.from_numpy(gguf.quants.dequantize(raw, kind).astype(np.float64))
    values, scale = elements(leaves["weight"], spec), leaves["weight_scale"]
    if "weight_zero" in leaves:
        values = values - scales(leaves["weight_zero"], spec, values.shape)
    if spec.dtype.endswith("_double"):
        nested = leaves["weight_scale_absmax"].double().repeat_interleave(256)[: scale.numel()].view(scale.shape)
        scale = leaves["weight_scale_map"].double()[scale.long()] * nested + leaves["weight_scale_offset"].double()
    values = values * scales(scale, spec, values.shape)
    if spec.dtype == "nvfp4":
        values = values / leaves["weight_global_scale"].double().item()
    return torch.from_numpy(values)


def input_values(x: Tensor, codes: Quantized, spec: QSpec | None) -> Tensor:
    """The activations [M, K] that codes stand for; x itself where none are quantized."""
    if spec is None:
        return x.cpu().double()
    values, scale = codes.codes.cpu().double(), codes.scale.cpu().double()
    if spec.dtype == "nvfp4":
        scale = scale[:, :-1] * scale[:, -1:]
    if spec.size:
        scale = scale.repeat_interleave(spec.size, dim=1)[:, : values.shape[1]]
    return (values * scale)[:, : x.shape[1]]
