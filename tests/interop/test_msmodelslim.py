"""msModelSlim's files: what each type means, in float64 and from its formulas, is what the loaded layers compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.linear import build_linear
from lightx2v.mm.static import StepScales
from lightx2v.plan.layers import ComponentPlan, plan_component
from tests.interop import msmodelslim_files as files
from tests.interop.stored import CPU, relative_error

N, K, STEPS = 64, 128, 6
LAYER = "blocks.0.ffn.0"
Leaves = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS, X = random(N, K), random(N, seed=1), random(9, K, seed=2)
SCALE, OFFSET = torch.tensor([0.031]), torch.tensor([-7.0])


def opened(tmp_path: Path, kind: str, leaves: Leaves, layer: str = LAYER) -> Checkpoint:
    path = files.write(tmp_path, {"norm.weight": torch.ones(3)}, {layer: (kind, leaves)})
    return open_any(path, Wanted(lambda layer: True))


def planned(checkpoint: Checkpoint) -> ComponentPlan:
    return plan_component(
        "dit",
        checkpoint,
        checkpoint.path,
        {LAYER: (N, K)},
        rename=None,
        mm_type="auto",
        rules=(),
        auto_quant=False,
        fallback=False,
        device=CPU,
        dtype_bytes=4,
    )


def loaded(checkpoint: Checkpoint) -> torch.nn.Module:
    (layer,) = planned(checkpoint).layers
    built = build_linear(layer, bias=True, dtype=torch.float32, auto_quant=False)
    for name, tensor in checkpoint.stream():
        owner, _, leaf = name.rpartition(".")
        if owner == LAYER:
            built.load_tensor(leaf, tensor)  # type: ignore[operator]
    built.finish()  # type: ignore[operator]
    return built


def static_result(leaves: Leaves, scale: Tensor, offset: Tensor) -> Tensor:
    """deq_scale * (codes of x . codes of W + quant_bias), as MindIE computes it."""
    codes = ((X.double() / scale.double()).round() + offset.double()).clamp(-128, 127)
    deq, folded = leaves["deq_scale"], leaves["quant_bias"]
    return (codes @ leaves["weight"].double().t() + folded.double()) * deq.double()


def test_w8a8_dynamic(tmp_path: Path) -> None:
    leaves = files.dynamic(WEIGHT, BIAS)
    checkpoint = opened(tmp_path, "W8A8_DYNAMIC", leaves)
    assert planned(checkpoint).layers[0].mm_type == "int8"
    scale = X.double().abs().amax(dim=1, keepdim=True) / 127
    codes = (X.double() / scale).round()
    weight = leaves["weight"].double() * leaves["weight_scale"].double()
    assert relative_error(loaded(checkpoint)(X), codes @ weight.t() * scale + BIAS) < 1e-6


@pytest.mark.parametrize("legacy", [True, False])
def test_w8a8_static(legacy: bool, tmp_path: Path) -> None:
    leaves = files.static(WEIGHT, BIAS, SCALE, OFFSET, legacy=legacy)
    checkpoint = opened(tmp_path, "W8A8", leaves)
    assert planned(checkpoint).layers[0].mm_type == "int8-static-asym"
    # The bias is rounded to whole steps in the file's quant_bias, and stored as it is beside it.
    steps = static_result(leaves, SCALE, OFFSET)
    assert (loaded(checkpoint)(X).double() - steps).abs().max() <= leaves["deq_scale"].max() * 0.51


def test_deq_scale_of_fp16_models_holds_bits(tmp_path: Path) -> None:
    as_floats = opened(tmp_path / "a", "W8A8", files.static(WEIGHT, BIAS, SCALE, OFFSET, legacy=False))
    as_bits = opened(tmp_path / "b", "W8A8", files.static(WEIGHT, BIAS, SCALE, OFFSET, legacy=False, half=True))
    assert torch.equal(as_floats.load(f"{LAYER}.weight_scale"), as_bits.load(f"{LAYER}.weight_scale"))


def test_w8a8_timestep(tmp_path: Path) -> None:
    scales, offsets = torch.linspace(0.02, 0.04, STEPS), torch.arange(STEPS) * 3.0 - 9
    leaves = files.static(WEIGHT, BIAS, scales, offsets, legacy=True)
    checkpoint = opened(tmp_path, "W8A8_TIMESTEP", leaves)
    assert planned(checkpoint).layers[0].mm_type == "int8-timestep"
    layer = loaded(checkpoint)
    steps = StepScales(layer, STEPS)
    plain = loaded(opened(tmp_path / "plain", "W8A8_DYNAMIC", files.dynamic(WEIGHT, BIAS)))
    middle = STEPS // 2
    at = {leaf: leaves[leaf][middle] for leaf in ("deq_scale", "quant_bias")} | {"weight": leaves["weight"]}
    for step in range(STEPS):
        steps.at(step)
        if step < middle:
            assert torch.equal(layer(X), plain(X))
        else:
            wanted = static_result(at, scales[middle], offsets[middle])
            assert (layer(X).double() - wanted).abs().max() <= at["deq_scale"].max() * 0.51


@pytest.mark.parametrize(("groups", "mm_type"), [(1, "int8-channel-asym"), (2, "int8-g64-asym")])
def test_w8a16(groups: int, mm_type: str, tmp_path: Path) -> None:
    leaves = files.weight_only(WEIGHT, BIAS, groups)
    checkpoint = opened(tmp_path, "W8A16", leaves)
    assert planned(checkpoint).layers[0].mm_type == mm_type
    parts = leaves["weight"].double().unflatten(1, (groups, -1)) - leaves["weight_offset"].double().unsqueeze(2)
    weight = (parts * leaves["weight_scale"].double().unsqueeze(2)).flatten(1)
    assert relative_error(loaded(checkpoint)(X), X.double() @ weight.t() + BIAS) < 1e-5


@pytest.mark.parametrize(("bits", "kind", "mm_type"), [(8, "W8A8_MXFP8", "mxfp8"), (4, "W4A4_MXFP4", "mxfp4")])
@pytest.mark.parametrize("rows", [N, 128])
def test_mx_weights(bits: int, kind: str, mm_type: str, rows: int, tmp_path: Path) -> None:
    """Of 128 rows too, where the shape of the scales does not tell their order."""
    leaves = files.mx(random(rows, K), random(rows), bits)
    path = files.write(tmp_path, {}, {LAYER: (kind, leaves)})
    got = open_any(path, Wanted(lambda layer: False)).load(f"{LAYER}.weight")
    exponents = (leaves["weight_scale"].double() - 127).exp2().repeat_interleave(files.BLOCK, dim=1)
    if bits == 8:
        values = leaves["weight"].double()
    else:
        index = torch.stack((leaves["weight"] & 15, leaves["weight"] >> 4), dim=2).flatten(1).long()
        values = files.E2M1.double()[index & 7] * (1 - 2 * (index >> 3))
    assert torch.equal(got.double(), values * exponents)
    if rows == N:
        assert planned(opened(tmp_path / "plan", kind, leaves)).layers[0].mm_type == mm_type


def test_a_multiplier_before_the_linear(tmp_path: Path) -> None:
    smooth = random(K).abs() + 0.5
    inner = files.dynamic(WEIGHT * smooth, BIAS)
    path = files.write(
        tmp_path, {}, {f"{LAYER}.div": ("FLOAT", {"mul_scale": 1 / smooth}), f"{LAYER}.linear": ("W8A8_DYNAMIC", inner)}
    )
    checkpoint = open_any(path, Wanted(lambda layer: True))
    assert {name.rpartition(".")[0] for name in checkpoint.tensors} == {LAYER}
    moved = X.double() / smooth
    scale = moved.abs().amax(dim=1, keepdim=True) / 127
    weight = inner["weight"].double() * inner["weight_scale"].double()
    wanted = (moved / scale).round() @ weight.t() * scale + BIAS
    assert relative_error(loaded(checkpoint)(X), wanted) < 1e-4


def test_a_low_rank_branch(tmp_path: Path) -> None:
    down, up = random(4, K, seed=5), random(N, 4, seed=6)
    leaves = files.mx(WEIGHT, BIAS, 8) | {"svd_lowrank_l1": down, "svd_lowrank_l2": up}
    got = opened(tmp_path, "W8A8_MXFP8_SVD", leaves)
    plain = opened(tmp_path / "plain", "W8A8_MXFP8", files.mx(WEIGHT, BIAS, 8))
    assert relative_error(loaded(got)(X), loaded(plain)(X) + X @ down.t() @ up.t()) < 1e-6


def test_scales_of_attention(tmp_path: Path) -> None:
    scales = {f"blocks.0.self_attn.fa_{part}": random(4, 1, seed=i).abs() for i, part in enumerate("qkv")}
    layers = {
        name: ("FAQuant", {"scale": scale, "offset": torch.zeros(4, 1, dtype=torch.int8)})
        for name, scale in scales.items()
    }
    checkpoint = open_any(files.write(tmp_path, {}, layers), Wanted(lambda layer: True))
    assert set(checkpoint.tensors) == {f"blocks.0.self_attn.attn_scales.{part}" for part in "qkv"}
    assert torch.equal(checkpoint.load("blocks.0.self_attn.attn_scales.k"), scales["blocks.0.self_attn.fa_k"].view(4))


def without_description(path: Path) -> None:
    path.with_name("quant_model_description_w8a8.json").unlink()


def another_type(path: Path) -> None:
    description = path.with_name("quant_model_description_w8a8.json")
    said = json.loads(description.read_text())
    description.write_text(json.dumps(said | {f"{LAYER}.weight": "W4A4_FLATQUANT_DYNAMIC"}))


def unsaid(path: Path) -> None:
    description = path.with_name("quant_model_description_w8a8.json")
    said = json.loads(description.read_text())
    del said[f"{LAYER}.weight_scale"]
    description.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_description, "needs the one quant_model_description"),
        (another_type, f"'{LAYER}.weight' is of type W4A4_FLATQUANT_DYNAMIC"),
        (unsaid, f"does not name '{LAYER}.weight_scale'"),
    ],
)
def test_refused_by_name(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = files.write(tmp_path, {}, {LAYER: ("W8A8_DYNAMIC", files.dynamic(WEIGHT, BIAS))})
    damage(path)
    with pytest.raises(CheckpointError, match=says):
        open_any(path, Wanted(lambda layer: True))


def test_a_missing_tensor_and_an_offset_are_refused(tmp_path: Path) -> None:
    leaves = files.static(WEIGHT, BIAS, SCALE, OFFSET, legacy=False)
    del leaves["deq_scale"]
    with pytest.raises(CheckpointError, match=f"'{LAYER}.deq_scale', which W8A8 has, is missing"):
        opened(tmp_path / "a", "W8A8", leaves)
    offset = files.dynamic(WEIGHT, BIAS) | {"weight_offset": torch.ones(N, 1)}
    with pytest.raises(CheckpointError, match="is not zero"):
        opened(tmp_path / "b", "W8A8_DYNAMIC", offset).load(f"{LAYER}.weight")
