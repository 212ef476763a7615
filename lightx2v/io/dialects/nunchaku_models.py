"""The models that nunchaku itself has, FLUX.1 and Qwen-Image, as layers of the models that were quantized.

What is stored in another way than SVDQuant's layers under a model's own names:

    projections of the same tokens     are one layer of q, k and v: apart again, or together as FLUX's original has them
    FLUX's proj_out of single blocks   is two, of what comes from the attention and from the MLP
    modulations (AWQ)                  row i * C + c is channel i of vector c of C, and the bias of scales has 1 added
    second linears of an MLP in int4   unsigned codes of inputs + 0.171875 (a GELU is never less than -0.17), whose bias
                                       has the shift's part of the product taken out of it

Nothing here computes with unsigned codes: the last keep their weights, and inputs stay floats, which is closer to the
model that was quantized. Sources: `deepcompressor/backend/nunchaku/convert.py`, and nunchaku's `FluxModel.cpp` and
`transformer_qwenimage.py` (https://github.com/nunchaku-tech).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lightx2v.io.dialects.base import Found, Translation
from lightx2v.io.dialects.nunchaku_packed import CODES, Linear, PackedLayer
from lightx2v.io.dialects.nunchaku_parts import above, apart, beside, modulation, unshifted

_FLUX = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(?:qkv_proj|mlp_fc1|mlp_fc2)")
_QWEN = "NunchakuQwenImageTransformer2DModel"
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_STREAMS = {
    "": ("mlp", _QKV, "attn.to_qkv", "attn.to_out.0"),
    "_context": (
        "mlp_context",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.to_added_qkv",
        "attn.to_add_out",
    ),
}
"""Of a stream of FLUX's double blocks, by the end of its names: its MLP; its projections apart, and together; and the
projection behind the attention."""
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def model_of(found: Found, layers: Sequence[str]) -> Callable[[Translation], None] | None:
    """What takes one of nunchaku's own models apart; None where `layers` are of none that is known."""
    if any(_FLUX.fullmatch(layer) for layer in layers):
        return lambda translation: _flux(translation, layers)
    if found.checkpoint.metadata.get("model_class") == _QWEN:
        return lambda translation: _qwen(translation, layers)
    return None


def _flux(translation: Translation, layers: Sequence[str]) -> None:
    """Under diffusers' names; where layers may be put together, as `attn.to_qkv` and the like."""
    found = translation.found
    for block in dict.fromkeys(match[1] for layer in layers if (match := _FLUX.fullmatch(layer))):
        if PackedLayer(found, f"{block}.qkv_proj").read().mm_type == "nvfp4":
            raise found.refuse(
                f"'{block}' is of nvfp4, whose projections that are one layer here have factors of their own",
                "nunchaku's FLUX.1 of int4",
                "make the weights here: mm_type nvfp4, calibration with smooth 'svdquant'",
            )
        (_single_block if block.startswith("single_") else _double_block)(translation, block)
        for norm in _NORMS:
            if (name := f"{block}.{norm}.weight") in found.tensors:
                translation.rename(name, f"{block}.attn.{norm}.weight")
    for layer in layers:
        translation.take(*PackedLayer(found, layer).names)


def _double_block(translation: Translation, block: str) -> None:
    found = translation.found
    for stream, (mlp, parts, together, out) in _STREAMS.items():
        _modulation(translation, f"{block}.norm1{stream}.linear", 6)
        qkv = PackedLayer(found, f"{block}.qkv_proj{stream}")
        if found.wanted.whole:
            _parts(translation, [f"{block}.{part}" for part in parts], qkv)
        else:
            _add(translation, f"{block}.{together}", qkv.read())
        _add(translation, f"{block}.{out}", PackedLayer(found, f"{block}.out_proj{stream}").read())
        up, down = (PackedLayer(found, f"{block}.{mlp}_{name}") for name in ("fc1", "fc2"))
        _add(translation, f"{block}.ff{stream}.net.0.proj", up.read())
        _add(translation, f"{block}.ff{stream}.net.2", unshifted(down.read()))


def _single_block(translation: Translation, block: str) -> None:
    found = translation.found
    qkv, out, up, down = (
        PackedLayer(found, f"{block}.{name}") for name in ("qkv_proj", "out_proj", "mlp_fc1", "mlp_fc2")
    )
    _modulation(translation, f"{block}.norm.linear", 3)
    if found.wanted.whole:
        _parts(translation, [f"{block}.{part}" for part in _QKV], qkv)
        _add(translation, f"{block}.proj_mlp", up.read())
    else:
        _add(translation, f"{block}.attn.to_qkv_mlp_proj", above(qkv, qkv.read(), up.read()))
    _add(translation, f"{block}.proj_out", beside(out, out.read(), unshifted(down.read())))


def _qwen(translation: Translation, layers: Sequence[str]) -> None:
    found = translation.found
    for layer in layers:
        packed, parent = PackedLayer(found, layer), layer.rpartition(".")[0]
        if layer.endswith(".to_qkv"):
            _parts(translation, [f"{parent}.to_{one}" for one in "qkv"], packed)
        elif layer.endswith(".add_qkv_proj"):
            _parts(translation, [f"{parent}.add_{one}_proj" for one in "qkv"], packed)
        elif layer.endswith(("img_mod.1", "txt_mod.1")):
            _modulation(translation, layer, 6)
        else:
            linear = packed.read()
            shifted = layer.endswith("_mlp.net.2") and linear.mm_type != "nvfp4"
            _add(translation, layer, unshifted(linear) if shifted else linear)
        translation.take(*packed.names)


def _add(translation: Translation, layer: str, linear: Linear) -> None:
    translation.layer(layer, linear.mm_type, linear.leaves, linear.n, linear.k)
    if linear.bias is not None:
        translation.add(f"{layer}.bias", linear.bias)


def _parts(translation: Translation, layers: Sequence[str], packed: PackedLayer) -> None:
    """Equal parts of the rows of one as `layers`."""
    for layer, linear in zip(layers, apart(packed, len(layers)), strict=True):
        _add(translation, layer, linear)


def _modulation(translation: Translation, layer: str, vectors: int) -> None:
    """`layer`, if it is quantized: else it is stored as the model has it."""
    if f"{layer}.{CODES}" in translation.found.tensors:
        _add(translation, layer, modulation(PackedLayer(translation.found, layer).read(), vectors))
