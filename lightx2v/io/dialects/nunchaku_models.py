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
from dataclasses import replace

import torch
from torch import Tensor

from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import Found, Translation
from lightx2v.io.dialects.nunchaku_packed import Linear, PackedLayer
from lightx2v.quant.integers import integer_values
from lightx2v.quant.spec import INT4_G64

SHIFT = 0.171875
_WEIGHT_ONLY = "int4-g64"
_FLUX = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(?:qkv_proj|mlp_fc1|mlp_fc2)")
_QWEN = "NunchakuQwenImageTransformer2DModel"
_ROWS = ("weight", "weight_scale", "weight_zero", "lowrank_up")
_FLUX_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


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
    for block in dict.fromkeys(".".join(layer.split(".")[:2]) for layer in layers):

        def packed(name: str, block: str = block) -> PackedLayer:
            return PackedLayer(found, f"{block}.{name}")

        single = block.startswith("single_")
        first = packed("qkv_proj").read()
        if first.mm_type == "nvfp4":
            raise found.refuse(
                f"'{block}' is of nvfp4, whose projections that are one layer here have factors of their own",
                "nunchaku's FLUX.1 of int4",
                "make the weights here: mm_type nvfp4, calibration with smooth 'svdquant'",
            )
        names = {
            "qkv_proj": "attn.to_q attn.to_k attn.to_v",
            "qkv_proj_context": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        }
        if single:
            _modulation(translation, f"{block}.norm.linear", 3)
            up = packed("mlp_fc1").read()
            if found.wanted.whole:
                _apart(translation, packed("qkv_proj"), [f"{block}.{name}" for name in names["qkv_proj"].split()])
                _add(translation, f"{block}.proj_mlp", up)
            else:
                _add(translation, f"{block}.attn.to_qkv_mlp_proj", _above(found, block, first, up))
            _add(
                translation,
                f"{block}.proj_out",
                _beside(packed("out_proj").read(), _unshifted(packed("mlp_fc2").read())),
            )
        else:
            for stream, mlp in (("", "mlp"), ("_context", "mlp_context")):
                _modulation(translation, f"{block}.norm1{stream}.linear", 6)
                qkv = packed(f"qkv_proj{stream}")
                if found.wanted.whole:
                    _apart(translation, qkv, [f"{block}.{name}" for name in names[f"qkv_proj{stream}"].split()])
                else:
                    _add(translation, f"{block}.attn.to_{'added_' if stream else ''}qkv", qkv.read())
                _add(
                    translation,
                    f"{block}.{'attn.to_add_out' if stream else 'attn.to_out.0'}",
                    packed(f"out_proj{stream}").read(),
                )
                _add(translation, f"{block}.ff{stream}.net.0.proj", packed(f"{mlp}_fc1").read())
                _add(translation, f"{block}.ff{stream}.net.2", _unshifted(packed(f"{mlp}_fc2").read()))
        for norm in _FLUX_NORMS:
            if (name := f"{block}.{norm}.weight") in found.tensors:
                translation.rename(name, f"{block}.attn.{norm}.weight")
    for layer in layers:
        translation.take(*PackedLayer(found, layer).names)


def _qwen(translation: Translation, layers: Sequence[str]) -> None:
    found = translation.found
    for layer in layers:
        packed, parent = PackedLayer(found, layer), layer.rpartition(".")[0]
        translation.take(*packed.names)
        if layer.endswith(".to_qkv"):
            _apart(translation, packed, [f"{parent}.to_{one}" for one in "qkv"])
        elif layer.endswith(".add_qkv_proj"):
            _apart(translation, packed, [f"{parent}.add_{one}_proj" for one in "qkv"])
        elif layer.endswith(("img_mod.1", "txt_mod.1")):
            _modulation(translation, layer, 6)
        elif layer.endswith("_mlp.net.2") and (linear := packed.read()).mm_type != "nvfp4":
            _add(translation, layer, _unshifted(linear))
        else:
            _add(translation, layer, packed.read())


def _add(translation: Translation, layer: str, linear: Linear) -> None:
    translation.layer(layer, linear.mm_type, linear.leaves, linear.n, linear.k)
    if linear.bias is not None:
        translation.add(f"{layer}.bias", linear.bias)


def _apart(translation: Translation, packed: PackedLayer, layers: Sequence[str]) -> None:
    """Equal parts of the rows of a layer as `layers`."""
    step = packed.read().n // len(layers)
    if step % 128:
        raise packed.refuse(f"has {step} rows for each of {len(layers)} projections", "multiples of 128")
    for index, layer in enumerate(layers):
        rows = slice(index * step, (index + 1) * step)
        linear = packed.read(rows)
        # Scales of nvfp4 are in tiles of 128 rows, one after the other.
        leaves = {leaf: _rows(made, rows) if leaf in _ROWS else made for leaf, made in linear.leaves.items()}
        bias = None if linear.bias is None else _rows(linear.bias, rows)
        _add(translation, layer, replace(linear, n=step, leaves=leaves, bias=bias))


def _rows(made: Made, rows: slice) -> Made:
    return made._replace(
        make=lambda given: made.make(given)[rows].contiguous(), shape=(rows.stop - rows.start, *made.shape[1:])
    )


def _modulation(translation: Translation, layer: str, vectors: int) -> None:
    """A layer whose rows are the channels of `vectors` vectors in turns; some files leave it as floats."""
    if f"{layer}.qweight" not in translation.found.tensors:
        return
    linear = PackedLayer(translation.found, layer).read()
    order = torch.arange(linear.n).view(-1, vectors).t().reshape(-1)

    def ordered(made: Made) -> Made:
        return made._replace(make=lambda given: made.make(given)[order])

    bias = linear.bias
    if bias is not None:
        plain = ordered(bias)

        def without_ones(given: Given) -> Tensor:
            parts = plain.make(given).float().view(vectors, -1).clone()
            parts[[1, -2] if vectors > 3 else [1]] -= 1
            return parts.flatten()

        bias = plain._replace(make=without_ones, dtype="F32")
    _add(
        translation,
        layer,
        replace(linear, leaves={leaf: ordered(made) for leaf, made in linear.leaves.items()}, bias=bias),
    )


def _unshifted(linear: Linear) -> Linear:
    """A layer of shifted inputs as one of the inputs themselves, which stay floats."""
    weight, scale, multiplier, bias = (
        *(linear.leaves[leaf] for leaf in ("weight", "weight_scale", "input_multiplier")),
        linear.bias,
    )

    def moved(given: Given) -> Tensor:
        values = integer_values({"weight": weight.make(given), "weight_scale": scale.make(given)}, INT4_G64)
        shifted = (values.double() @ multiplier.make(given).double() * SHIFT).float()
        return shifted if bias is None else bias.make(given).float() + shifted

    needs = [
        need for made in (weight, scale, multiplier, *((bias,) if bias is not None else ())) for need in made.needs
    ]
    made = Made(tuple(dict.fromkeys(needs)), moved, "F32", (linear.n,))
    return replace(linear, mm_type=_WEIGHT_ONLY, bias=made)


def _joined(
    parts: Sequence[Made], join: Callable[[Sequence[Tensor]], Tensor], shape: tuple[int, ...], dtype: str = ""
) -> Made:
    needs = dict.fromkeys(need for part in parts for need in part.needs)
    return Made(tuple(needs), lambda given: join([part.make(given) for part in parts]), dtype or parts[0].dtype, shape)


def _beside(first: Linear, second: Linear) -> Linear:
    """Two layers of parts of an input, whose results are added, as one whose input stays floats."""
    both, k = (first, second), first.k + second.k
    ranks = [linear.leaves["lowrank_down"].shape[0] for linear in both]

    def joined(leaf: str, join: Callable[[Sequence[Tensor]], Tensor], shape: tuple[int, ...]) -> Made:
        return _joined([linear.leaves[leaf] for linear in both], join, shape)

    leaves = {
        "weight": joined("weight", _columns, (first.n, k // 2)),
        "weight_scale": joined("weight_scale", _columns, (first.n, k // 64)),
        "input_multiplier": joined("input_multiplier", _end_to_end, (k,)),
        "lowrank_down": joined("lowrank_down", lambda parts: torch.block_diag(*parts), (sum(ranks), k)),
        "lowrank_up": joined("lowrank_up", _columns, (first.n, sum(ranks))),
    }
    biases = [linear.bias for linear in both if linear.bias is not None]
    bias = (
        _joined(biases, lambda parts: torch.stack([part.float() for part in parts]).sum(0), (first.n,), "F32")
        if biases
        else None
    )
    return Linear(_WEIGHT_ONLY, first.n, k, leaves, bias)


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _columns(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


def _above(found: Found, block: str, first: Linear, second: Linear) -> Linear:
    """Two layers of the same input as one, the rows of the second below those of the first."""
    both, n = (first, second), first.n + second.n
    ranks = [linear.leaves["lowrank_down"].shape[0] for linear in both]

    def joined(leaf: str, join: Callable[[Sequence[Tensor]], Tensor], shape: tuple[int, ...]) -> Made:
        return _joined([linear.leaves[leaf] for linear in both], join, shape)

    def same(parts: Sequence[Tensor]) -> Tensor:
        if not torch.equal(parts[0], parts[1]):
            raise found.refuse(f"'{block}' has a smoothing of its own for each of qkv_proj and mlp_fc1", "one for both")
        return parts[0]

    leaves = {
        "weight": joined("weight", _end_to_end, (n, first.k // 2)),
        "weight_scale": joined("weight_scale", _end_to_end, (n, first.k // 64)),
        "input_multiplier": joined("input_multiplier", same, (first.k,)),
        "lowrank_down": joined("lowrank_down", _end_to_end, (sum(ranks), first.k)),
        "lowrank_up": joined("lowrank_up", lambda parts: torch.block_diag(*parts), (n, sum(ranks))),
    }
    if first.bias is None or second.bias is None:
        raise found.refuse(f"'{block}' lacks a bias of qkv_proj or mlp_fc1", "both")
    return Linear(first.mm_type, n, first.k, leaves, _joined([first.bias, second.bias], _end_to_end, (n,)))
