"""LoRAs on a tiny FLUX.1, whose projections are one layer where diffusers has three or four."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.features.compile import compile_blocks
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.spec import FLUX
from tests.models import tiny_flux as tiny
from tests.models.lora_data import Pair, Request, branches, load_model, plan_for, random_pairs, write_lora

TWIN = tiny.tiny_transformer()
STATE = tiny.original_state(TWIN)
ARCH = FluxArch.from_shapes({name: tuple(tensor.shape) for name, tensor in STATE.items()}, "tiny")
INPUTS = tiny.random_inputs(ARCH, 1, (4, 4))
plan_flux, load_flux = functools.partial(plan_for, FLUX, ARCH), functools.partial(load_model, FLUX, ARCH, STATE)


def pairs_of(model: nn.Module, rank: int = 4, alpha: float | None = None, seed: int = 0) -> dict[str, Pair]:
    """Pairs for every linear of a model; ranks differ."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, nn.Linear):
            own = rank + number % 3
            down = torch.randn(own, layer.in_features, generator=generator) / layer.in_features**0.5
            found[name] = Pair(down, torch.randn(layer.out_features, own, generator=generator) * 0.1, alpha)
    return found


def merged_twin(pairs: dict[str, Pair], strength: float = 1.0) -> FluxTransformer2DModel:
    twin = copy.deepcopy(TWIN)
    with torch.no_grad():
        for name, pair in pairs.items():
            twin.get_submodule(name).weight += strength * pair.product  # type: ignore[operator]
    return twin


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    out: Tensor = model(*INPUTS)
    return out


@torch.no_grad()
def run_twin(twin: FluxTransformer2DModel) -> Tensor:
    return tiny.run_twin(twin, *INPUTS)


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def underscored(name: str) -> str:
    return "lora_transformer_" + name.replace(".", "_")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rename", ["transformer.{}".format, "base_model.model.transformer.{}".format, underscored])
def test_names_of_diffusers(tmp_path: Path, rename: Any, dynamic: bool) -> None:
    """Every linear, so rows of the fused ones and the halves that diffusers exchanges, against diffusers' own model."""
    pairs = pairs_of(TWIN, alpha=3.0)
    made = write_lora(tmp_path / "a.safetensors", pairs, (".lora_down.weight", ".lora_up.weight"), rename)
    model, _ = load_flux(plan_flux([Request(made.path, 0.8)], dynamic=dynamic))
    wanted = run_twin(merged_twin(pairs, 0.8))
    assert tiny.relative_error(run_twin(TWIN), wanted) > 0.1
    assert tiny.relative_error(run(model), wanted) < 5e-6


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rename", [kohya, "diffusion_model.{}".format, str])
def test_original_names(tmp_path: Path, rename: Any, dynamic: bool) -> None:
    pairs = pairs_of(tiny.tiny_dit(), alpha=2.0)
    made = write_lora(tmp_path / "a.safetensors", pairs, (".lora_down.weight", ".lora_up.weight"), rename)
    model, _ = load_flux(plan_flux([made], dynamic=dynamic))
    merged = tiny.tiny_dit()
    with torch.no_grad():
        for name, pair in pairs.items():
            merged.get_submodule(name).weight += pair.product  # type: ignore[operator]
    assert tiny.relative_error(run(model), run(merged)) < 5e-6


@pytest.mark.parametrize("dynamic", [False, True])
def test_names_of_xlabs(tmp_path: Path, dynamic: bool) -> None:
    """As diffusers translates them."""
    dim, generator = ARCH.dim, torch.Generator().manual_seed(0)
    sizes = {f"double_blocks.{i}.processor.qkv_lora{j}": (dim, 3 * dim) for i in range(2) for j in (1, 2)}
    sizes |= {f"double_blocks.{i}.processor.proj_lora{j}": (dim, dim) for i in range(2) for j in (1, 2)}
    sizes |= {f"single_blocks.{i}.processor.qkv_lora": (dim, 3 * dim) for i in range(3)}
    sizes |= {f"single_blocks.{i}.processor.proj_lora": (dim + ARCH.ffn_dim, dim) for i in range(3)}
    pairs = {
        name: Pair(torch.randn(4, k, generator=generator) / k**0.5, torch.randn(n, 4, generator=generator) * 0.2)
        for name, (k, n) in sizes.items()
    }
    made = write_lora(tmp_path / "a.safetensors", pairs, (".down.weight", ".up.weight"))
    translated = _convert_xlabs_flux_lora_to_diffusers(load_file(made.path))
    layers = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in translated}
    of_twin = {
        layer: Pair(translated[f"transformer.{layer}.lora_A.weight"], translated[f"transformer.{layer}.lora_B.weight"])
        for layer in layers
    }
    model, _ = load_flux(plan_flux([made], dynamic=dynamic))
    wanted = run_twin(merged_twin(of_twin))
    assert tiny.relative_error(run_twin(TWIN), wanted) > 0.1
    assert tiny.relative_error(run(model), wanted) < 5e-6


@pytest.mark.parametrize("mm_type", ["int8", "fp8"])
def test_beside_codes_switched_and_detached(tmp_path: Path, mm_type: str) -> None:
    pairs, others = pairs_of(TWIN), pairs_of(TWIN, rank=9, seed=1)
    paths = [write_lora(tmp_path / f"{i}.safetensors", made) for i, made in enumerate((pairs, others))]
    plain, _ = load_flux(None, mm_type)
    cost = tiny.relative_error(run(plain), run_twin(TWIN))
    model, loras = load_flux(plan_flux([paths[0]], mm_type), mm_type)
    assert tiny.relative_error(run(model), run_twin(merged_twin(pairs))) < 3 * cost
    loras.switch(plan_flux([paths[1]], mm_type))
    assert tiny.relative_error(run(model), run_twin(merged_twin(others))) < 3 * cost
    assert loras.detach() and torch.equal(run(model), run(plain)) and not branches(model)


def test_one_graph_for_each_kind_of_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    requests = [write_lora(tmp_path / f"{seed}.safetensors", pairs_of(TWIN, seed=seed)) for seed in (0, 1)]
    plans = [plan_flux([request], dynamic=True) for request in requests]
    model, loras = load_flux(plans[0], uniform=True)
    compile_blocks(model)
    before = run(model)
    assert counter.frame_count == 2
    assert not loras.switch(plans[1]) and not torch.equal(run(model), before)
    assert not loras.switch(plans[0]) and torch.equal(run(model), before)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_lora_of_another_family(tmp_path: Path) -> None:
    from tests.models.tiny_checkpoints import tiny_dit

    made = write_lora(tmp_path / "a.safetensors", random_pairs(tiny_dit("t2v")))
    with pytest.raises(CheckpointError, match="is no LoRA for this model: 40 of its 40 keys match nothing"):
        plan_flux([made])
