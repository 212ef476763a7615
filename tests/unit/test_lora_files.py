"""What a LoRA file says by its header, and the errors of files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.features.lora.plan import LoraPlan, plan_loras
from lightx2v.features.lora.source import LoraSource
from lightx2v.io.lora import Place, read_lora, tensor_names
from tests.models.lora_data import CPU, DictSource, Request

SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.attn.qkv.weight": (24, 8),
    "blocks.0.attn.qkv.bias": (24,),
    "blocks.0.mlp_up.weight": (32, 8),
    "blocks.0.modulation": (1, 6, 8),
    "patch.weight": (8, 4, 1, 2, 2),
}
NAMES = tensor_names(
    [
        *((name, Place(name)) for name in SHAPES),
        ("layers.0.to_k.weight", Place("blocks.0.attn.qkv.weight", 8, 16)),
        ("layers.0.to_k.bias", Place("blocks.0.attn.qkv.bias", 8, 16)),
    ]
)


def write(path: Path, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    save_file({key: torch.full(shape, 2.0) for key, shape in shapes.items()}, path, metadata=metadata or None)
    return path


def read(path: Path, shapes: dict[str, tuple[int, ...]], alpha: float | None = None, **metadata: str) -> list[Any]:
    """(target, first row, row after the last, rank, scale) of each delta."""
    file = read_lora(write(path, shapes, **metadata), NAMES, SHAPES, alpha)
    return [(d.target, d.start, d.stop, d.rank, d.scale) for d in file.deltas]


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "base_model.model.transformer."])
def test_a_key_is_prefix_layer_and_suffix(tmp_path: Path, prefix: str) -> None:
    layer = f"{prefix}layers.0.to_k"
    found = read(tmp_path / "a.safetensors", {f"{layer}.lora_A.weight": (4, 8), f"{layer}.lora_B.weight": (8, 4)})
    assert found == [("blocks.0.attn.qkv.weight", 8, 16, 4, 1.0)]


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "lycoris_"])
@pytest.mark.parametrize("layer", ["blocks_0_mlp_up", "blocks.0.mlp_up"])
def test_underscores_stand_for_dots(tmp_path: Path, prefix: str, layer: str) -> None:
    shapes = {"lora_down.weight": (4, 8), "lora_up.weight": (32, 4), "alpha": ()}
    found = read(tmp_path / "a.safetensors", {f"{prefix}{layer}.{leaf}": shape for leaf, shape in shapes.items()})
    assert found == [("blocks.0.mlp_up.weight", 0, 32, 4, 2.0 / 4)]


def test_xlabs_names_of_a_family(tmp_path: Path) -> None:
    names = tensor_names([("double.0.qkv_lora1.weight", Place("blocks.0.attn.qkv.weight"))])
    keys = {f"double.0.processor.qkv_lora1.{half}.weight": shape for half, shape in (("down", (4, 8)), ("up", (24, 4)))}
    (delta,) = read_lora(write(tmp_path / "a.safetensors", keys), names, SHAPES).deltas
    assert (delta.target, delta.stop, delta.rank) == ("blocks.0.attn.qkv.weight", 24, 4)


def test_alpha(tmp_path: Path) -> None:
    pair: dict[str, tuple[int, ...]] = {"layers.0.to_k.lora_A.weight": (4, 8), "layers.0.to_k.lora_B.weight": (8, 4)}
    path = tmp_path / "a.safetensors"
    assert [found[-1] for found in read(path, pair)] == [1.0]
    assert [found[-1] for found in read(path, pair, alpha=8.0)] == [2.0]
    assert [found[-1] for found in read(path, pair | {"layers.0.to_k.alpha": ()}, alpha=8.0)] == [0.5]
    described = json.dumps({"transformer.lora_alpha": 3, "transformer.r": 4})
    assert [found[-1] for found in read(path, pair, lora_adapter_metadata=described)] == [0.75]
    with pytest.raises(CheckpointError, match="alpha_pattern is not supported"):
        read(path, pair, lora_adapter_metadata=json.dumps({"transformer.alpha_pattern": {"to_k": 3}}))
    for broken in ("{", "[]"):
        with pytest.raises(CheckpointError, match="is no JSON object"):
            read(path, pair, lora_adapter_metadata=broken)


def test_all_that_one_layer_may_have(tmp_path: Path) -> None:
    keys: dict[str, tuple[int, ...]] = {
        "layers.0.to_k.lora_A.weight": (4, 8),
        "layers.0.to_k.lora_B.weight": (8, 4),
        "layers.0.to_k.lora_B.bias": (8,),
        "layers.0.to_k.alpha": (),
        "blocks.0.attn.qkv.diff": (24, 8),
        "diffusion_model.blocks.0.diff_m": (1, 6, 8),
        "patch.lora_down.weight": (3, 4, 1, 2, 2),
        "patch.lora_up.weight": (8, 3, 1, 1, 1),
    }
    assert sorted(read(tmp_path / "a.safetensors", keys)) == [
        ("blocks.0.attn.qkv.bias", 8, 16, 0, 0.5),
        ("blocks.0.attn.qkv.weight", 0, 24, 0, 1.0),
        ("blocks.0.attn.qkv.weight", 8, 16, 4, 0.5),
        ("blocks.0.modulation", 0, 1, 0, 1.0),
        ("patch.weight", 0, 8, 3, 1.0),
    ]


UP = "blocks.0.mlp_up"
GOOD: dict[str, tuple[int, ...]] = {f"{UP}.lora_A.weight": (4, 8), f"{UP}.lora_B.weight": (32, 4)}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (GOOD | {"blocks.0.mlp_op.lora_A.weight": (4, 8)}, "did you mean 'blocks.0.mlp_up.weight'"),
        (GOOD | {"lora_te1_text_model_q.alpha": ()}, "1 of its 3 keys match nothing in the model"),
        ({f"{UP}.dora_scale": (32,), **GOOD}, f"{UP}.dora_scale"),
        ({f"double.{i}.lora_A.weight": (4, 8) for i in range(5)} | GOOD, "is no LoRA for this model: 5 of its 7 keys"),
        ({f"{UP}.lora_A.weight": (4, 8)}, "lacks its 'up' half"),
        ({f"{UP}.lora_B.weight": (32, 4)}, "lacks its 'down' half"),
        ({f"{UP}.alpha": ()}, "lacks its 'up' half"),
        (GOOD | {f"{UP}.lora_A.weight": (4, 9)}, "what adds to a tensor of (32, 8)"),
        (GOOD | {f"{UP}.lora_B.weight": (31, 4)}, "(31, 4) @ (4, 8)"),
        (GOOD | {f"{UP}.lora_B.weight": (32, 5)}, "(32, 5) @ (4, 8)"),
        (GOOD | {f"{UP}.lora_B.weight": (32,)}, "(32,) @ (4, 8)"),
        ({"layers.0.to_k.lora_A.weight": (4, 8), "layers.0.to_k.lora_B.weight": (24, 4)}, "to a tensor of (8, 8)"),
        ({"blocks.0.diff_m": (6, 8)}, "has the shape (6, 8)"),
        ({f"{UP}.diff_b": (32,)}, "1 of its 1 keys match nothing"),
        (GOOD | {f"{UP}.lora_down.weight": (4, 8)}, "are the same half of one layer"),
        (GOOD | {f"transformer.{key}": shape for key, shape in GOOD.items()}, f"are both for '{UP}.weight'"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, keys: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path / "a.safetensors", keys)
    assert says in str(error.value) and "a.safetensors" in str(error.value)


def model() -> nn.Module:
    with torch.device("meta"):
        block = nn.ModuleDict(
            {"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)}), "mlp_up": nn.Linear(8, 32, bias=False)}
        )
        return nn.ModuleDict({"blocks": nn.ModuleList([block]), "out": nn.Linear(8, 2)})


def plan(*requests: Request, **options: Any) -> LoraPlan:
    def aliases(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
        if name == "blocks.0.attn.qkv.weight":
            yield "layers.0.to_k.weight", Place(name, 8, 16)

    return plan_loras(requests, model(), aliases, **options)


def test_what_is_added_and_what_is_beside(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.safetensors", GOOD | {"out.diff_b": (2,)}))
    for dynamic, quantized, beside in (
        (None, [], []),
        (None, [UP], [UP]),
        (True, [], [UP]),
        (True, [UP], [UP]),
        (False, [UP], []),
    ):
        made = plan(Request(path), dynamic=dynamic, quantized=quantized)
        assert list(made.beside) == beside and ("out.bias" in made.added)
        assert (f"{UP}.weight" in made.added) is not bool(beside)
        assert made.branch_bytes(2) == (2 * 4 * (8 + 32) if beside else 0)
    with pytest.raises(ConfigError, match=r"lora_dynamic: is false, but .* holds quantized"):
        plan(Request(path), dynamic=False, quantized=[UP], stored=[UP])
    (told,) = plan(Request(path, 0.5), dynamic=True).to_json()
    assert told == {"name": "a", "path": path, "strength": 0.5, "rank": 4, "added": 1, "beside": 1}
    assert not plan() and plan(Request(path))


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.safetensors", GOOD))
    with pytest.raises(ConfigError, match="two are called 'a'"):
        plan(Request(path), Request(path, 0.5))
    assert len(plan(Request(path), Request(path, 0.5, name="b")).loras) == 2
    with pytest.raises(ConfigError, match=r"the strength of .* is nan"):
        plan(Request(path, float("nan")))
    with pytest.raises(CheckpointError, match="no such file"):
        plan(Request(str(tmp_path / "none.safetensors")))


def test_a_source_gives_each_tensor_with_all_that_is_added(tmp_path: Path) -> None:
    pair = {"layers.0.to_k.lora_A.weight": (4, 8), "layers.0.to_k.lora_B.weight": (8, 4)}
    requests = [
        Request(str(write(tmp_path / f"{name}.safetensors", pair)), scale) for name, scale in (("a", 1), ("b", 2))
    ]
    stored = {"blocks.0.attn.qkv.weight": torch.randn(24, 8).bfloat16(), f"{UP}.weight": torch.randn(32, 8)}
    inner = DictSource(stored)
    source = LoraSource(inner, plan(*requests), CPU)
    read = dict(source.read(None))
    wanted = stored["blocks.0.attn.qkv.weight"].float()
    wanted[8:16] += 3 * 4 * 2.0 * 2.0  # rank 4, all factors 2
    torch.testing.assert_close(read["blocks.0.attn.qkv.weight"], wanted)
    assert read[f"{UP}.weight"] is stored[f"{UP}.weight"] and source.names == inner.names
    assert [name for name, _ in source.read([f"{UP}.weight"])] == [f"{UP}.weight"]
    source.plan = LoraPlan()
    assert dict(source.read())["blocks.0.attn.qkv.weight"] is stored["blocks.0.attn.qkv.weight"]
    lacking = LoraSource(DictSource({f"{UP}.weight": stored[f"{UP}.weight"]}), plan(*requests), CPU)
    with pytest.raises(CheckpointError, match="which the checkpoint of the model does not have"):
        list(lacking.read())
    codes = {"blocks.0.attn.qkv.weight": torch.zeros(24, 8, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match="which is quantized"):
        list(LoraSource(DictSource(codes), plan(*requests), CPU).read())
