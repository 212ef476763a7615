"""What quantizes a transformer of diffusers, or any module, in place: AngelSlim's interface."""

from __future__ import annotations

from lightx2v.integrations.angelslim.files import load_quantized_model
from lightx2v.integrations.angelslim.quantizer import DynamicDiTQuantizer

__all__ = ["DynamicDiTQuantizer", "load_quantized_model"]
