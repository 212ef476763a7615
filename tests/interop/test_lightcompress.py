"""LightCompress' norms: what LightX2V computes with them, in float64, is what the loaded layer gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.reference import LIBRARY
from lightx2v.mm.scheme import parse
from lightx2v.quant.around import take_around

N, K = 32, 64
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "ffn.0")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state() -> dict[str, Tensor]:
    """One block: weights that were multiplied with what their input is divided by, in int8 per channel."""
    tensors: dict[str, Tensor] = {}
    for number, norm in enumerate(("affine_norm1", "affine_norm3")):
        smooth = random(K, seed=number).abs() + 0.5
        tensors |= {f"blocks.0.{norm}.weight": smooth, f"blocks.0.{norm}.bias": smooth.clone()}
    for number, layer in enumerate(LAYERS):
        weight = random(N, K, seed=number + 5)
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[f"blocks.0.{layer}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"blocks.0.{layer}.weight_scale"] = scale
    return tensors


def opened(tensors: dict[str, Tensor], folder: Path) -> Checkpoint:
    save_file(tensors, folder / "int8.safetensors")
    return open_any(folder / "int8.safetensors", Wanted(lambda layer: True))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_gives_what_lightx2v_computes(layer: str, tmp_path: Path) -> None:
    tensors = state()
    checkpoint = opened(tensors, tmp_path)
    assert not [name for name in checkpoint.tensors if "affine" in name]
    prefix = f"blocks.0.{layer}."
    leaves = {name.removeprefix(prefix): t.clone() for name, t in checkpoint.stream() if name.startswith(prefix)}
    normed, scale, shift = random(5, K, seed=20), random(K, seed=21), random(K, seed=22)
    around = take_around(leaves, K, layer)
    scheme = parse("int8-weight-only-reference")
    got = LIBRARY.linear(scheme, around.input(normed * (1 + scale) + shift), LIBRARY.prepare(scheme, leaves), None)
    norm = "affine_norm3" if layer == "ffn.0" else "affine_norm1"
    weight, bias = (tensors[f"blocks.0.{norm}.{leaf}"].double() for leaf in ("weight", "bias"))
    smoothed = normed.double() * ((1 + scale.double()) * weight) + shift.double() * bias
    wanted = smoothed @ (tensors[f"{prefix}weight"].double() * tensors[f"{prefix}weight_scale"].double()).t()
    assert float((got.double() - wanted).norm() / wanted.norm()) < 1e-5


def test_what_is_no_multiplier_is_refused_by_name(tmp_path: Path) -> None:
    tensors = state()
    tensors["blocks.0.affine_norm3.bias"] = tensors["blocks.0.affine_norm3.bias"] + 1
    with pytest.raises(CheckpointError, match=r"affine_norm3.weight' and 'blocks.0.affine_norm3.bias' differ"):
        opened(tensors, tmp_path).load("blocks.0.ffn.0.input_multiplier")


@pytest.mark.parametrize("name", ["blocks.0.affine_norm1.bias", "blocks.0.self_attn.k.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    tensors = state()
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        opened(tensors, tmp_path)
