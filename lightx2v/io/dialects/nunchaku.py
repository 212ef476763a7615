"""SVDQuant's layers in nunchaku's order (https://github.com/nunchaku-tech/nunchaku).

Under a model's own names, as diffusers loads them as `nunchaku_lite`, and of the models that nunchaku itself has:
`nunchaku_models` takes these apart. `nunchaku_packed` says what the tensors of a layer are.
"""

from __future__ import annotations

from lightx2v.io.dialects.base import Found, Translation
from lightx2v.io.dialects.nunchaku_models import model_of
from lightx2v.io.dialects.nunchaku_packed import CODES, DO, PackedLayer

_FUSED = ("qkv_proj", "to_qkv", "add_qkv_proj", "to_added_qkv", "mlp_fc1", "mlp_fc2")
"""Layers of nunchaku's own models, which are not those of the model that was quantized."""


class Nunchaku:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        """From what no other package has beside a `qweight`."""
        layers = found.ending(f".{CODES}")
        return any(f"{layer}.{leaf}" in found.tensors for layer in layers for leaf in ("wscales", "smooth_factor"))

    def translate(self, found: Found) -> Translation:
        """W4A4 of int4 and nvfp4, and AWQ's W4A16, layer by layer; of nunchaku's own models FLUX and Qwen-Image."""
        layers = found.ending(f".{CODES}")
        translation = Translation(found)
        own = model_of(found, layers)
        if own is not None:
            own(translation)
            return translation
        model = found.checkpoint.metadata.get("model_class", "")
        fused = next((layer for layer in layers if layer.rpartition(".")[2] in _FUSED), None)
        if fused is not None or model.startswith("Nunchaku"):
            what = f"'{fused}' is a layer" if fused is not None else f"'{layers[0]}' is of {model}, a model"
            raise found.refuse(
                f"{what} of nunchaku's own: it puts projections together and orders rows of modulations anew",
                "layers under the names of the model, as diffusers' nunchaku_lite; nunchaku's FLUX.1 and Qwen-Image",
                DO,
            )
        for layer in layers:
            packed = PackedLayer(found, layer)
            linear = packed.read()
            translation.take(*packed.names)
            translation.layer(layer, linear.mm_type, linear.leaves, linear.n, linear.k)
            if linear.bias is not None:
                translation.add(f"{layer}.bias", linear.bias)
        return translation


DIALECT = Nunchaku()
