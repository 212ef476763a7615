"""Multipliers folded into what stands before a linear: the model computes the same."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.features.lora.plan import plan_loras
from lightx2v.io.declared import declare_layers, declared_layers, folded_layers, merge_metadata
from lightx2v.models.flux.spec import FLUX
from lightx2v.models.fold import Foldable, conditioned, fold_multiplier, foldable
from lightx2v.models.spec import FamilySpec
from lightx2v.models.wan.spec import WAN
from tests.models import tiny_checkpoints, tiny_flux
from tests.models.lora_data import random_pairs, write_lora

Model = tuple[nn.Module, FamilySpec, tuple[object, ...]]


def model(name: str) -> Model:
    if name == "flux":
        flux = tiny_flux.tiny_dit()
        return flux, FLUX, tiny_flux.random_inputs(flux.arch, 2, (4, 6))
    wan = tiny_checkpoints.tiny_dit(name)
    return wan, WAN, tiny_checkpoints.random_inputs(wan.arch, 2, (3, 4, 6))


def random_multiplier(width: int, seed: int) -> Tensor:
    """Between 0.1 and 10."""
    return 10 ** (2 * torch.rand(width, generator=torch.Generator().manual_seed(seed)) - 1)


def fold_all(dit: nn.Module, family: FamilySpec, only: str = "*") -> list[str]:
    """Give every foldable linear a multiplier, divide its weight by it, and fold it; the linears that got one."""
    tensors = dict(dit.state_dict())
    done: list[str] = []
    for number, (name, layer) in enumerate(dit.named_modules()):
        if not isinstance(layer, nn.Linear) or name in done or not fnmatchcase(name, only):
            continue
        record = foldable(family.foldable, name, tensors)
        if record is None:
            continue
        m = conditioned(record, random_multiplier(layer.in_features, number))
        for consumer in record.consumers:
            tensors[f"{consumer}.weight"] = tensors[f"{consumer}.weight"] / m
            done.append(consumer)
        fold_multiplier(tensors, record, m)
    dit.load_state_dict(tensors)
    return done


@pytest.mark.parametrize("name", ["t2v", "i2v", "flux"])
@torch.no_grad()
def test_the_model_computes_the_same(name: str) -> None:
    dit, family, inputs = model(name)
    before = dit(*inputs)
    changed = {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    folded = fold_all(dit, family)
    assert any(not torch.equal(changed[key], tensor) for key, tensor in dit.state_dict().items())
    assert tiny_checkpoints.relative_error(dit(*inputs), before) < 1e-5
    consumers = {pattern for record in family.foldable for pattern in record.consumers}
    assert {pattern for layer in folded for pattern in consumers if fnmatchcase(layer, pattern)} == consumers


@pytest.mark.parametrize("name", ["t2v", "i2v", "flux"])
@torch.no_grad()
def test_without_the_division_it_does_not(name: str) -> None:
    dit, family, inputs = model(name)
    before, tensors = dit(*inputs), dict(dit.state_dict())
    layer = "double_blocks.1.img_attn.qkv" if name == "flux" else "blocks.1.self_attn.o"
    record = foldable(family.foldable, layer, tensors)
    assert record is not None
    fold_multiplier(tensors, record, random_multiplier(128, 1))
    dit.load_state_dict(tensors)
    assert tiny_checkpoints.relative_error(dit(*inputs), before) > 1e-2


def test_what_cannot_be_folded_has_no_record() -> None:
    wan = dict(tiny_checkpoints.tiny_dit("t2v").state_dict())
    for layer in ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.k", "cross_attn.v", "ffn.0", "ffn.2"):
        assert foldable(WAN.foldable, f"blocks.0.{layer}", wan) is None
    flux = dict(tiny_flux.tiny_dit().state_dict())
    for layer in ("double_blocks.0.img_mlp.2", "double_blocks.0.img_mod.lin", "single_blocks.0.linear2", "img_in"):
        assert foldable(FLUX.foldable, layer, flux) is None
    no_norm = {name for name in wan if ".norm3." not in name}
    assert foldable(WAN.foldable, "blocks.0.cross_attn.q", no_norm) is None


def test_a_record_is_of_one_block_and_of_the_layers_that_are_there() -> None:
    image = dict(tiny_checkpoints.tiny_dit("i2v").state_dict())
    for tensors, wanted in ((image, ("v", "v_img")), ({n: t for n, t in image.items() if "_img" not in n}, ("v",))):
        record = foldable(WAN.foldable, "blocks.1.cross_attn.o", tensors)
        assert record is not None and record.consumers == ("blocks.1.cross_attn.o",)
        assert record.producers == tuple(f"blocks.1.cross_attn.{name}" for name in wanted)


@torch.no_grad()
def test_a_modulation_keeps_its_digits_in_bfloat16() -> None:
    """m (1 + scale) - 1 close to -1 would lose them: a factor of 0.1 is off by percents then."""
    m = random_multiplier(64, 0)
    record = Foldable("modulation", ("a",), ("b",), shift=0, scale=1)
    generator = torch.Generator().manual_seed(1)
    scale = 0.2 * torch.randn(64, generator=generator)
    bias = torch.cat([torch.zeros(64), scale])
    errors = []
    for multiplier in (conditioned(record, m), m):
        tensors = {"b.weight": torch.zeros(128, 8, dtype=torch.bfloat16), "b.bias": bias.bfloat16()}
        wanted = multiplier * (1 + tensors["b.bias"].float()[64:])
        fold_multiplier(tensors, record, multiplier)
        got = 1 + tensors["b.bias"].float()[64:]
        errors.append(float(((got - wanted) / wanted).abs().max()))
    assert errors[0] < 2**-8 < 4 * 2**-8 < errors[1]
    rows = Foldable("rows", ("a",), ("b",))
    assert torch.equal(conditioned(rows, m), m)


def test_a_modulation_without_a_bias_is_refused() -> None:
    record = Foldable("modulation", ("a",), ("b",), shift=0, scale=1)
    with pytest.raises(CheckpointError, match="no bias"):
        fold_multiplier({"b.weight": torch.ones(4, 2)}, record, torch.full((2,), 2.0))


def test_a_file_says_which_layers_were_changed() -> None:
    tensors = dict(tiny_checkpoints.tiny_dit("t2v").state_dict())
    record = foldable(WAN.foldable, "blocks.0.self_attn.o", tensors)
    assert record is not None
    metadata = [
        declare_layers({"blocks.0.ffn.0": "W-int8-channel-sym"}, record.layers),
        declare_layers({"a": "b"}, ["x"]),
    ]
    assert folded_layers(metadata[0]) == {"blocks.0.self_attn.o", "blocks.0.self_attn.v"}
    assert folded_layers(merge_metadata(*metadata)) == {"blocks.0.self_attn.o", "blocks.0.self_attn.v", "x"}
    assert declared_layers(merge_metadata(*metadata)) == {"blocks.0.ffn.0": "W-int8-channel-sym", "a": "b"}
    assert folded_layers({}) == folded_layers(declare_layers({"a": "b"})) == frozenset()


def test_no_lora_is_put_on_a_layer_that_was_changed(tmp_path: Path) -> None:
    wan = tiny_checkpoints.tiny_dit("t2v")
    request = write_lora(tmp_path / "lora.safetensors", random_pairs(wan, ["self_attn.v"]))
    assert plan_loras([request], wan, WAN.aliases, folded=["blocks.0.cross_attn.q"])
    for dynamic in (False, True):
        with pytest.raises(
            CheckpointError, match=r"changes 'blocks\.1\.self_attn\.v', whose weights hold a multiplier"
        ):
            plan_loras([request], wan, WAN.aliases, dynamic=dynamic, folded=["blocks.1.self_attn.v"])
