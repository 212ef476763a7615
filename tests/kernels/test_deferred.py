"""Blocks as few passes: codes handed from norms to products, and the same results as one step after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightx2v import deferred, elementwise
from lightx2v.attention import turned
from lightx2v.attention.base import ATTENTION
from lightx2v.kernels import ops
from lightx2v.mm import together
from lightx2v.mm.fused import fuse_projections
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.lowrank import LowRankLinear
from lightx2v.mm.scheme import parse
from lightx2v.mm.together import feed_forward, project
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.dit import DoubleBlock, SingleBlock
from lightx2v.models.flux.dit import rope_table as flux_rope
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import Block, rope_table

WAN = WanArch(dim=64, ffn_dim=96, num_heads=2, num_layers=1, freq_dim=32, text_dim=24, model_type="t2v")
PASSES = (
    "add_gated",
    "layer_norm",
    "layer_norm_codes",
    "sum_norm",
    "sum_norm_codes",
    "gelu_codes",
    "gelu_tanh",
    "joined_gelu_codes",
)
ATTENDING = ("rms_rope", "attention_turned")
Leaves = Callable[[int, int], dict[str, Tensor]]
Change = Callable[[nn.Module], None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Every device has the kernels in Triton; how often each was called."""
    monkeypatch.setattr(elementwise, "kernels_for", lambda *_: ops)
    counts: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            counts[name] += 1
            return real(*args)

        return run

    for name in (*PASSES, *ATTENDING):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counts


def quantize(model: nn.Module, mm_type: str, dtype: torch.dtype, more: Leaves = lambda n, k: {}) -> None:
    """Every linear of `model` in an mm_type, with `more` leaves for a weight [n, k]."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "mod" not in name:
            n, k = layer.out_features, layer.in_features
            made = QuantLinear(k, n, True, parse(mm_type), "triton", dtype, weight_auto_quant=True, name=name)
            leaves = {"weight": layer.weight.detach(), "bias": layer.bias.detach(), **more(n, k)}
            for leaf, tensor in leaves.items():
                made.load_tensor(leaf, tensor.to(layer.weight.device))
            made.finish()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)


def both(
    run: Callable[[], tuple[Tensor, ...]],
    passes: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    attending: bool = False,
) -> Counter[str]:
    """Assert that deferred and undeferred computation agree bit for bit; the passes of the deferred one."""
    with torch.no_grad():
        together = run()
        counted = Counter({name: count for name, count in passes.items() if name in PASSES or attending})
        with monkeypatch.context() as patch:
            patch.setattr(deferred, "_kernels", lambda *_: None)
            patch.setattr(turned, "_TURNING", {})
            apart = run()
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    return counted


def wan_block(device: torch.device, arch: WanArch = WAN) -> tuple[Block, Callable[[], tuple[Tensor, ...]]]:
    """A block with random weights, and what it makes of random tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block(arch, 0).to(device).eval()
    rope = tuple(table.to(device) for table in rope_table(arch.head_dim, (1, 2, 3)))
    x, time = normal(2, 6, arch.dim, seed=1).to(device), normal(1, 6, arch.dim, seed=2).to(device)
    text = tuple(normal(2, 4, 2, arch.head_dim, seed=seed).bfloat16().to(device) for seed in (3, 4))
    return block, lambda: (block.compute(x, time, rope, (text,), torch.bfloat16),)  # type: ignore[arg-type]


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("mm_type", ["int8-triton", "fp8-triton"])
def test_a_wan_block_hands_codes_to_every_product_behind_a_norm(
    mm_type: str, fuse: bool, device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, run = wan_block(device)
    quantize(block, mm_type, torch.bfloat16)
    if fuse:
        assert fuse_projections(block) == 2
    counted = both(run, passes, monkeypatch)
    # The last addition ends the block; the two in front of a norm are made along with it.
    assert counted == {"layer_norm_codes": 1, "sum_norm_codes": 2, "gelu_codes": 1, "add_gated": 1}


def test_multipliers_of_inputs_go_into_the_pass(
    device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, run = wan_block(device)
    quantize(block, "int8-triton", torch.bfloat16, lambda n, k: {"input_multiplier": 0.5 + normal(k).abs()})
    counted = both(run, passes, monkeypatch)
    assert counted == {"layer_norm_codes": 1, "sum_norm_codes": 2, "gelu_codes": 1, "add_gated": 1}


def rotated(block: nn.Module) -> None:
    size = torch.tensor(32, dtype=torch.int32)
    quantize(block, "int8-triton", torch.bfloat16, lambda n, k: {"input_rotation": size})


def low_ranks(block: nn.Module) -> None:
    def ranks(n: int, k: int) -> dict[str, Tensor]:
        return {"lowrank_down": normal(4, k) * 0.1, "lowrank_up": normal(n, 4, seed=1) * 0.1}

    quantize(block, "int8-triton", torch.bfloat16, ranks)


def branched(block: nn.Module) -> None:
    quantize(block, "int8-triton", torch.bfloat16)
    for name, layer in list(block.named_modules()):
        if isinstance(layer, QuantLinear) and layer.packed is not None:
            sizes = (layer.in_features, layer.out_features, 4)
            branch = LowRankLinear(layer, *sizes, device=layer.packed.weight.device, dtype=torch.bfloat16)
            branch.down.copy_(normal(4, layer.in_features) * 0.1)
            branch.up.copy_(normal(layer.out_features, 4, seed=1) * 0.1)
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, branch)


def floats(block: nn.Module) -> None:
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            layer.bfloat16()


@pytest.mark.parametrize("change", [rotated, low_ranks, branched, floats], ids=lambda change: change.__name__)
def test_what_reads_the_norm_itself_gets_a_tensor(
    change: Change, device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, run = wan_block(device)
    change(block)
    counted = both(run, passes, monkeypatch)
    assert counted == {"layer_norm": 1, "sum_norm": 2, "gelu_tanh": 1, "add_gated": 1}


@pytest.mark.parametrize("mm_type", ["int8-triton", "fp8-b128-triton"])
def test_a_single_block_of_flux_quantizes_what_it_joins(
    mm_type: str, device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = FluxArch(num_layers=0, num_single_layers=1, dim=64, num_heads=2, ffn_dim=96, axes=(8, 12, 12))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = SingleBlock(arch, 0).to(device).eval()
    quantize(block, mm_type, torch.bfloat16)
    block.modulation.bfloat16()
    rope = tuple(table.to(device) for table in flux_rope(arch.axes, 3, ((1, 2, 2),)))
    x, text = normal(2, 4, 64, seed=1).to(device), normal(2, 3, 64, seed=2).to(device)
    vec = normal(2, 64, seed=3).bfloat16().to(device)
    with torch.no_grad():
        got = block.compute(x, text, vec, rope)  # type: ignore[arg-type]
        joined = mm_type == "int8-triton"
        assert passes["joined_gelu_codes"] == joined and passes["gelu_tanh"] == (not joined)
        monkeypatch.setattr(together, "has_gelu_codes", lambda x: False)
        apart = block.compute(x, text, vec, rope)  # type: ignore[arg-type]
    assert all(map(torch.equal, got, apart))
    assert passes["gelu_tanh"] == 2 - joined


@pytest.mark.parametrize("name", ["triton_8bit", "triton_8bit_fp16", "torch_sdpa"])
def test_queries_and_keys_are_normed_and_rotated_where_they_become_codes(
    name: str, device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = replace(WAN, dim=128)
    block, run = wan_block(device, arch)
    block.bfloat16()
    block.self_attn.attention = ATTENTION[name].fn
    counted = both(run, passes, monkeypatch, attending=True)
    fused = name != "torch_sdpa"
    assert counted["attention_turned"] == fused and counted["rms_rope"] == (1 if fused else 3)


def test_a_single_block_of_flux_as_well(
    device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = FluxArch(num_layers=0, num_single_layers=1, dim=128, num_heads=2, ffn_dim=96, axes=(16, 24, 24))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = SingleBlock(arch, 0).to(device).bfloat16().eval()
    block.joint.attention = ATTENTION["triton_8bit"].fn
    rope = tuple(table.to(device) for table in flux_rope(arch.axes, 3, ((1, 2, 2),)))
    x, text = normal(1, 4, 128, seed=1).to(device), normal(1, 3, 128, seed=2).to(device)
    vec = normal(1, 128, seed=3).bfloat16().to(device)
    counted = both(lambda: block.compute(x, text, vec, rope), passes, monkeypatch, attending=True)  # type: ignore[arg-type]
    assert counted["attention_turned"] == 1 and not counted["rms_rope"]


def test_a_double_block_of_flux_does_the_same_for_both_streams(
    device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = FluxArch(num_layers=1, num_single_layers=0, dim=64, num_heads=2, ffn_dim=96, axes=(8, 12, 12))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = DoubleBlock(arch, 0).to(device).eval()
    quantize(block, "fp8-triton", torch.bfloat16)
    for name in ("img_mod", "txt_mod"):
        block.get_submodule(name).bfloat16()
    rope = tuple(table.to(device) for table in flux_rope(arch.axes, 3, ((1, 2, 2),)))
    x, text = normal(1, 4, 64, seed=1).to(device), normal(1, 3, 64, seed=2).to(device)
    vec = normal(1, 64, seed=3).bfloat16().to(device)
    counted = both(lambda: block.compute(x, text, vec, rope), passes, monkeypatch)  # type: ignore[arg-type]
    assert counted == {"layer_norm_codes": 2, "sum_norm_codes": 2, "gelu_codes": 2, "add_gated": 2}


@pytest.mark.parametrize("mm_type", ["int8-triton", "fp8-triton"])
def test_before_compute_capability_8_9_no_pass_makes_codes_of_e4m3(
    mm_type: str, device: torch.device, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, run = wan_block(device)
    quantize(block, mm_type, torch.bfloat16)
    monkeypatch.setattr(elementwise, "compute_capability", lambda device: (8, 0))
    elementwise.makes_codes.cache_clear()
    try:
        counted = both(run, passes, monkeypatch)
    finally:
        elementwise.makes_codes.cache_clear()
    of_codes = {name for name in counted if name.endswith("codes")}
    assert of_codes == ({"layer_norm_codes", "sum_norm_codes", "gelu_codes"} if mm_type == "int8-triton" else set())


def test_layers_that_disagree_share_the_tensor(device: torch.device, passes: Counter[str]) -> None:
    layers = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32)}).to(device)
    quantize(layers, "int8-triton", torch.float32)
    eight = nn.ModuleDict({"a": nn.Linear(64, 32)}).to(device)
    quantize(eight, "fp8-triton", torch.float32)
    x, table = normal(2, 3, 64).to(device), normal(1, 1, 64, seed=1).to(device)
    with torch.no_grad():
        norm = deferred.modulated_norm(x, table, table, 1e-6, torch.float32)
        assert isinstance(norm, deferred.Normed)
        whole = norm.tensor()
        for pair in ((layers["a"], layers["b"]), (layers["a"], eight["a"])):
            wanted = [layer(whole) for layer in pair]
            assert all(map(torch.equal, project(norm, *pair), wanted))
        assert passes["layer_norm_codes"] == 1
        wide = nn.Linear(32, 16).to(device)
        wanted_ffn = wide(ops.gelu_tanh(layers["a"](whole)))
        assert torch.equal(feed_forward(norm, layers["a"], wide), wanted_ffn)


def test_a_sum_is_made_once_and_lets_go_of_its_parts(device: torch.device, passes: Counter[str]) -> None:
    x, y = normal(2, 3, 64).to(device), normal(2, 3, 64, seed=1).to(device)
    with torch.no_grad():
        total = deferred.add_gated(x, y)
        assert isinstance(total, deferred.Sum) and not passes
        first = deferred.tensor_of(total)
        assert torch.equal(first, x + y) and deferred.tensor_of(total) is first is total.x is total.y
        norm = deferred.layer_norm(total, y[0, 0], y[0, 1], 1e-6, torch.float32)
        wanted = nn.functional.layer_norm(x + y, (64,), y[0, 0], y[0, 1], 1e-6)
        torch.testing.assert_close(deferred.tensor_of(norm), wanted, rtol=1e-5, atol=1e-5)
    assert passes == {"add_gated": 1, "layer_norm": 1}
    assert isinstance(deferred.add_gated(x.requires_grad_(), y), deferred.Sum)  # by the patched kernels


def test_without_kernels_everything_is_a_tensor_at_once() -> None:
    x, table = normal(1, 3, 64), normal(1, 1, 64, seed=1)
    assert isinstance(deferred.add_gated(x, x), Tensor)
    assert isinstance(deferred.modulated_norm(x, table, table, 1e-6, torch.bfloat16), Tensor)
    assert isinstance(deferred.layer_norm(x, table[0, 0], table[0, 0], 1e-6, torch.bfloat16), Tensor)
