"""optimum-quanto's interface to quantized weights, activations and training, computed by this engine."""

from __future__ import annotations

from lightx2v.integrations.quanto.calibration import Calibration
from lightx2v.integrations.quanto.diffusers import QuantoConfig, quantize_diffusers
from lightx2v.integrations.quanto.files import load_quantized, save_quantized
from lightx2v.integrations.quanto.model import freeze, learn_ranges, quantization_map, quantize, requantize
from lightx2v.integrations.quanto.modules import QuantizedConv2d, QuantizedLayerNorm, QuantizedLinear
from lightx2v.integrations.quanto.qtypes import QType, qfloat8, qfloat8_e4m3fn, qint2, qint4, qint8
from lightx2v.integrations.quanto.solve import solve

__all__ = [
    "Calibration",
    "QType",
    "QuantizedConv2d",
    "QuantizedLayerNorm",
    "QuantizedLinear",
    "QuantoConfig",
    "freeze",
    "learn_ranges",
    "load_quantized",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qint2",
    "qint4",
    "qint8",
    "quantization_map",
    "quantize",
    "quantize_diffusers",
    "requantize",
    "save_quantized",
    "solve",
]
