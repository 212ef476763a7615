"""Static scales of attention: observed while a DiT runs, written, loaded again beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v.attention.fa3 import prepared
from lightx2v.attention.policy import PolicySwitch, Watched, resolve_policy
from lightx2v.attention.scales import check_scales, hold_scales
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.calibrate.attention import observe_attention
from lightx2v.components import empty_dit, fill_dit
from lightx2v.config.features import AttentionConfig
from lightx2v.errors import CheckpointError, LightX2VError
from lightx2v.models.base import set_attention
from lightx2v.models.flux.spec import FLUX
from lightx2v.models.spec import FamilySpec
from lightx2v.models.wan.spec import WAN
from lightx2v.platform import select_device
from lightx2v.quant.calibration.ranges import recall_window
from lightx2v.quant.hadamard import rotation_size
from tests.models import tiny_checkpoints as tiny
from tests.models import tiny_flux

CPU = torch.device("cpu")
STATIC = "fa3_int8_static_ref"


def model(name: str) -> tuple[Any, FamilySpec, tuple[Any, ...]]:
    if name == "flux":
        flux = tiny_flux.tiny_dit()
        return flux, FLUX, tiny_flux.random_inputs(flux.arch, 2, (4, 6))
    wan = tiny.tiny_dit(name)
    return wan, WAN, tiny.random_inputs(wan.arch, 1, (2, 4, 6), text_tokens=9)


def switch(dit: Any, backend: str) -> PolicySwitch:
    slots = [(part.layer, part.part) for part in dit.attention_parts()]
    policy = resolve_policy(AttentionConfig(type=backend), select_device("cpu"), slots, 1, "float32")
    return PolicySwitch(dit.attention_parts(), policy)


def loaded(path: Path, family: FamilySpec, arch: Any) -> Any:
    dit: Any = empty_dit(family, arch, {}, torch.float32, auto_quant=False)
    checkpoint = family.open(path)
    hold_scales(
        dit, dit.attention_parts(), map(family.original_name, checkpoint.tensors), arch.num_heads, arch.head_dim
    )
    fill_dit(dit, ((family.original_name(n), t) for n, t in checkpoint.stream()), CPU, torch.float32, str(path))
    return dit.eval()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", ["t2v", "i2v", "flux"])
@torch.no_grad()
def test_observed_written_and_loaded(name: str, rotated: bool, tmp_path: Path) -> None:
    dit, family, inputs = model(name)
    before = dit(*inputs)
    with observe_attention(dit, rotated=rotated) as observer:
        assert torch.equal(dit(*inputs), before)
    scales = observer.scales()
    assert len(scales) == 5 * len(list(dit.attention_parts()))
    assert dict(dit.named_modules()).keys() >= {holder.rpartition(".")[0].rpartition(".")[0] for holder in scales}
    path = tmp_path / "dit.safetensors"
    save_file(dict(dit.state_dict()) | scales, path)
    again = loaded(path, family, dit.arch)
    assert torch.equal(again(*inputs), before)  # no other backend minds the scales
    assert {name: t for name, t in again.state_dict().items() if "attn_scales" in name}.keys() == scales.keys()
    switch(again, STATIC).at(0)
    error = tiny.relative_error(again(*inputs), before)
    switch(again, f"fa3_int8_ref{'_rotated' if rotated else ''}").at(0)
    dynamic = tiny.relative_error(again(*inputs), before)
    assert 0 < error < max(0.03, 2 * dynamic)


def test_a_window_is_that_of_each_call_and_the_widest_of_all() -> None:
    dit = tiny.tiny_dit("t2v")
    generator = torch.Generator().manual_seed(3)
    calls = [
        tuple(size * torch.randn(1, tokens, 4, 32, generator=generator) for tokens in (500, 70, 70))
        for size in (1.0, 3.0)
    ]
    with observe_attention(dit, ["blocks.1.self_attn"], rotated=True) as observer:
        for q, k, v in calls:
            dit.blocks[1].self_attn.attention(q, k, v)
    found = observer.scales()
    assert {name.rpartition(".")[0] for name in found} == {"blocks.1.self_attn.attn_scales"}
    seen = [(*prepared(q, k, 32, True), v) for q, k, v in calls]
    for index, (leaf, ratio) in enumerate((("q", 0.9999), ("k", 0.9999), ("v", 1.0))):
        values = [call[index].transpose(0, 2).flatten(1) for call in seen]
        windows = [recall_window(each, ratio) for each in values]
        ends = torch.stack([torch.maximum(high, -low) for low, high in windows]).amax(0) / 127
        got = found[f"blocks.1.self_attn.attn_scales.{leaf}"]
        # A window of whole bins is up to two bins longer: 4096 of them cover at most four times the largest value.
        assert bool((got >= ends - 1e-7).all()) and bool((got <= ends * (1 + 2 * 4 / 4096) + 1e-7).all())
    assert int(found["blocks.1.self_attn.attn_scales.rotation"]) == rotation_size(32) == 32
    assert int(found["blocks.1.self_attn.attn_scales.smoothed"]) == 1


@torch.no_grad()
def test_observation_goes_on_from_a_state_and_survives_a_change_of_backend() -> None:
    dit, _, inputs = model("t2v")
    other = (inputs[0] * 2, *inputs[1:])
    with observe_attention(dit) as whole:
        switch(dit, "torch_sdpa_math").at(0)
        dit(*inputs)
        assert isinstance(dit.blocks[0].self_attn.attention, Watched)
        switch(dit, "torch_sdpa").at(0)
        dit(*other)
    assert dit.blocks[0].self_attn.attention is torch_sdpa
    with observe_attention(dit) as first:
        dit(*inputs)
    with observe_attention(dit) as second:
        second.load_state(first.state())
        dit(*other)
    wanted, got = whole.scales(), second.scales()
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-8)
    assert any(not torch.equal(first.scales()[name], tensor) for name, tensor in wanted.items())


def test_nothing_to_observe_is_an_error() -> None:
    dit = tiny.tiny_dit("t2v")
    with (
        pytest.raises(LightX2VError, match="no attention of the model is named"),
        observe_attention(dit, ["nothing.*"]),
    ):
        pass
    with observe_attention(dit) as observer:
        pass
    with pytest.raises(LightX2VError, match="no attention was called"):
        observer.scales()


def broken(scales: dict[str, Tensor], leaf: str, value: Tensor | None) -> dict[str, Tensor]:
    name = f"blocks.1.self_attn.attn_scales.{leaf}"
    rest = {other: tensor for other, tensor in scales.items() if other != name}
    return rest if value is None else rest | {name: value}


@pytest.mark.parametrize(
    ("leaf", "value", "says"),
    [
        ("k", None, "missing: k"),
        ("q", torch.ones(3), r"'q' float32 \[3\]"),
        ("v", torch.tensor([1.0, 0.0, 1.0, 1.0]), "positive"),
        ("v", torch.ones(4, dtype=torch.int8), "'v' int8"),
        ("rotation", torch.tensor(24), "power of two that divides 32"),
        ("rotation", torch.tensor(64), "power of two that divides 32"),
        ("offset", torch.ones(4), "'offset' is not part of it"),
    ],
)
@torch.no_grad()
def test_scales_that_do_not_fit_are_refused_by_name(leaf: str, value: Tensor | None, says: str, tmp_path: Path) -> None:
    dit, family, inputs = model("t2v")
    with observe_attention(dit) as observer:
        dit(*inputs)
    path = tmp_path / "dit.safetensors"
    save_file(dict(dit.state_dict()) | broken(observer.scales(), leaf, value), path)
    with pytest.raises(CheckpointError, match=says) as caught:
        loaded(path, family, dit.arch)
    assert "blocks.1.self_attn.attn_scales" in str(caught.value)


def test_missing_scales_are_told_by_name_before_loading() -> None:
    needed = {"blocks.0.self_attn.attn_scales": STATIC}
    shapes: dict[str, tuple[int, ...]] = {f"blocks.0.self_attn.attn_scales.{leaf}": (4,) for leaf in "qkv"}
    check_scales("a file", needed, shapes, 4)
    with pytest.raises(CheckpointError, match=r"attn_scales\.q' has shape \[4\], wanted is \[8\]"):
        check_scales("a file", needed, shapes, 8)
    del shapes["blocks.0.self_attn.attn_scales.v"]
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.self_attn\.attn_scales\.v' is missing") as caught:
        check_scales("a file", needed, shapes, 4)
    assert STATIC in str(caught.value) and "calibrate first" in str(caught.value)


def test_set_attention_takes_the_place_of_what_was_watched() -> None:
    dit = tiny.tiny_dit("t2v")
    set_attention(dit, torch_sdpa)
    with observe_attention(dit):
        assert all(isinstance(part.module.attention, Watched) for part in dit.attention_parts())
    assert all(part.module.attention is torch_sdpa for part in dit.attention_parts())
