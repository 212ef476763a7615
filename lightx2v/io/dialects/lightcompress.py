"""LightCompress' exports for LightX2V, which LightX2V reads with `quant_method: advanced_ptq` (its commit f8aee98).

Beside LightX2V's own tensors of quantized layers, the smoothing of what comes out of a block's two modulated norms:

    blocks.N.affine_norm1.weight, .bias [K]    before self_attn.q, k and v
    blocks.N.affine_norm3.weight, .bias [K]    before ffn.0

LightX2V computes norm(x) * (1 + scale) * weight + shift * bias of the modulation's scale and shift. With the same
weight and bias, which is what smoothing makes, that is a multiplier of the layers' input.
"""

from __future__ import annotations

from torch import Tensor

from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import Found, Translation

_NORMS = {".affine_norm1": ("self_attn.q", "self_attn.k", "self_attn.v"), ".affine_norm3": ("ffn.0",)}


class LightCompress:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        return any(f"{norm}." in name for name in found.tensors for norm in _NORMS)

    def translate(self, found: Found) -> Translation:
        """The multiplier of a norm beside each layer that reads it."""
        translation = Translation(found)
        for norm, layers in _NORMS.items():
            for block in found.ending(f"{norm}.weight", f"{norm}.bias"):
                weight, bias = f"{block}{norm}.weight", f"{block}{norm}.bias"
                for name in (weight, bias):
                    if name not in found.tensors or len(found.tensors[name].shape) != 1:
                        raise found.refuse(f"'{name}' is missing or no vector", do="export the model again")
                for layer in layers:
                    self._multiply(translation, f"{block}.{layer}", weight, bias)
        return translation

    def _multiply(self, translation: Translation, layer: str, weight: str, bias: str) -> None:
        found = translation.found
        size = found.tensors[weight].shape

        def multiplier(given: Given) -> Tensor:
            if not given[weight].float().equal(given[bias].float()):
                raise found.refuse(
                    f"'{weight}' and '{bias}' differ: no multiplier of the input of '{layer}' does the same",
                    "the same values in both",
                )
            return given[weight].float()

        if f"{layer}.weight" not in found.tensors:
            raise found.refuse(f"'{weight}' is there, and '{layer}.weight', which reads it, is not")
        translation.add(f"{layer}.input_multiplier", Made((weight, bias), multiplier, "F32", size))


DIALECT = LightCompress()
