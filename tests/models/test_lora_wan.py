"""LoRAs on a tiny Wan: every style of key, added or beside, on floats and on codes, one or several, and exchanged."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.config.features import OffloadConfig
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.features.compile import compile_blocks
from lightx2v.features.lora.attach import Loras
from lightx2v.features.lora.plan import LoraPlan, plan_loras
from lightx2v.features.lora.source import LoraSource
from lightx2v.features.offload.load import load_offloaded
from lightx2v.io.lora import Place
from lightx2v.mm.fused import FusedPart
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.lowrank import LowRankLinear
from lightx2v.mm.together import feed_forward
from lightx2v.models.wan.dit import WanDiT
from lightx2v.models.wan.keymap import to_diffusers
from lightx2v.models.wan.spec import WAN
from lightx2v.platform import select_device
from tests.models import tiny_checkpoints as tiny
from tests.models.lora_data import (
    CPU,
    LAYERS,
    DictSource,
    Pair,
    Request,
    branches,
    empty_model,
    load_wan,
    merged_by_hand,
    plan_wan,
    random_pairs,
    write_lora,
)

SHAPE = (1, (2, 4, 4))
PLAIN = tiny.tiny_dit("t2v")
ARCH, STATE = PLAIN.arch, PLAIN.state_dict()
INPUTS = tiny.random_inputs(ARCH, *SHAPE)
COMFY = "diffusion_model.{}".format
LAYER = "blocks.1.self_attn.q"


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


def diffusers(layer: str) -> str:
    return f"transformer.{to_diffusers(layer)}"


def underscored(layer: str) -> str:
    return "lora_transformer_" + to_diffusers(layer).replace(".", "_")


STYLES: dict[str, tuple[tuple[str, str], Callable[[str], str]]] = {
    "LightX2V and ComfyUI, PEFT's halves": ((".lora_A.weight", ".lora_B.weight"), COMFY),
    "LightX2V and ComfyUI": ((".lora_down.weight", ".lora_up.weight"), COMFY),
    "diffusers": ((".lora_A.weight", ".lora_B.weight"), diffusers),
    "PEFT": ((".lora_A.weight", ".lora_B.weight"), "base_model.model.{}".format),
    "PEFT with its adapter": ((".lora_A.default.weight", ".lora_B.default.weight"), str),
    "PEFT with an adapter of another name": ((".lora_A.my-style.weight", ".lora_B.my-style.weight"), str),
    "kohya": ((".lora_down.weight", ".lora_up.weight"), kohya),
    "kohya, names of diffusers": ((".lora_down.weight", ".lora_up.weight"), underscored),
    "older diffusers": (("_lora.down.weight", "_lora.up.weight"), diffusers),
    "diffusers before PEFT": ((".lora.down.weight", ".lora.up.weight"), diffusers),
    "transformers": ((".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), diffusers),
    "bare factors": ((".lora_A", ".lora_B"), str),
}


@torch.no_grad()
def run(model: nn.Module, inputs: tuple[Any, ...] = INPUTS) -> Tensor:
    out: Tensor = model(*inputs)
    return out


def by_hand(*loras: tuple[dict[str, Pair], float], state: dict[str, Tensor] = STATE) -> Tensor:
    model = WanDiT(ARCH).eval()
    model.load_state_dict(merged_by_hand(state, *loras))
    return run(model)


def request(path: Path, pairs: dict[str, Pair], **changes: Any) -> Request:
    made = write_lora(path, pairs, rename=COMFY)
    return Request(**{**made.__dict__, **changes})


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_style_is_what_merging_by_hand_is(tmp_path: Path, style: str, alpha: float | None, dynamic: bool) -> None:
    suffixes, rename = STYLES[style]
    pairs = random_pairs(PLAIN, alpha=alpha)
    plan = plan_wan(ARCH, [write_lora(tmp_path / "a.safetensors", pairs, suffixes, rename)], dynamic=dynamic)
    model, _ = load_wan(ARCH, STATE, plan)
    wanted = by_hand((pairs, 1.0))
    assert tiny.relative_error(run(PLAIN), wanted) > 0.1
    assert tiny.relative_error(run(model), wanted) < 2e-6
    assert bool(branches(model)) is dynamic


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    pairs = {name: Pair(pair.down.to(dtype), pair.up.to(dtype)) for name, pair in random_pairs(PLAIN).items()}
    made = write_lora(tmp_path / "a.safetensors", pairs, dtype=dtype)
    for dynamic in (False, True):
        model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], dynamic=dynamic))
        assert tiny.relative_error(run(model), by_hand((pairs, 1.0))) < 2e-6


def test_alpha_of_the_configuration_and_of_a_peft_folder(tmp_path: Path) -> None:
    pairs = random_pairs(PLAIN)
    wanted = by_hand((pairs, 3 / 4))
    model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [request(tmp_path / "a.safetensors", pairs, alpha=3.0)]))
    assert tiny.relative_error(run(model), wanted) < 1e-6
    write_lora(tmp_path / "adapter_model.safetensors", pairs, rename="base_model.model.{}".format)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 3}))
    model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [Request(str(tmp_path / "adapter_model.safetensors"))]))
    assert tiny.relative_error(run(model), wanted) < 1e-6


@pytest.mark.parametrize("dynamic", [False, True])
def test_several_with_strengths(tmp_path: Path, dynamic: bool) -> None:
    first, second = random_pairs(PLAIN, rank=4), random_pairs(PLAIN, ("self_attn.k", "ffn.2"), rank=7, seed=1)
    requests = [request(tmp_path / "a.safetensors", first, strength=0.7)]
    requests.append(request(tmp_path / "b.safetensors", second, strength=-0.4))
    model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, requests, dynamic=dynamic))
    wanted = by_hand((first, 0.7), (second, -0.4))
    assert tiny.relative_error(run(model), wanted) < 2e-6


@pytest.mark.parametrize("mm_type", ["Default", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_strength_is_bit_equal_to_the_plain_model(tmp_path: Path, mm_type: str, dtype: torch.dtype) -> None:
    plain, _ = load_wan(ARCH, STATE, mm_type=mm_type, dtype=dtype)
    for dynamic in (False, True):
        made = request(tmp_path / "a.safetensors", random_pairs(PLAIN), strength=0.0)
        model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], mm_type, dynamic=dynamic), mm_type, dtype)
        assert torch.equal(run(model, cast(dtype)), run(plain, cast(dtype)))


def cast(dtype: torch.dtype) -> tuple[Any, ...]:
    latents, timestep, conditions = INPUTS
    return latents.to(dtype), timestep, tiny.Conditions(text=conditions.text.to(dtype))


def test_branch_in_bfloat16_is_as_near_as_the_merged_weights(tmp_path: Path) -> None:
    pairs = random_pairs(PLAIN)
    made, wanted = request(tmp_path / "a.safetensors", pairs), by_hand((pairs, 1.0))
    errors = []
    for dynamic in (False, True):
        model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], dynamic=dynamic), dtype=torch.bfloat16)
        errors.append(tiny.relative_error(run(model, cast(torch.bfloat16)), wanted))
    assert max(errors) < 0.02 and errors[1] < 1.5 * errors[0]


def groups(model: nn.Module) -> int:
    """How many single layers are parts of another, beyond the first of each."""
    return sum(isinstance(module, FusedPart) and module.start > 0 for module in model.modules())


@pytest.mark.parametrize("mm_type", ["int8", "fp8", "int8-reference", "fp8-b128", "fp8-pertensor", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("fuse", [False, True])
def test_beside_codes(tmp_path: Path, mm_type: str, fuse: bool) -> None:
    """As near as the merged weights without quantization, but for what quantization costs the plain model."""
    pairs = random_pairs(PLAIN)
    plain, _ = load_wan(ARCH, STATE, mm_type=mm_type, fuse=fuse)
    plan = plan_wan(ARCH, [request(tmp_path / "a.safetensors", pairs)], mm_type)
    model, _ = load_wan(ARCH, STATE, plan, mm_type, fuse=fuse)
    assert not plan.added and groups(model) == groups(plain)
    assert len(branches(model)) == len(LAYERS) * ARCH.num_layers - groups(plain)
    wanted = by_hand((pairs, 1.0))
    error, cost = tiny.relative_error(run(model), wanted), tiny.relative_error(run(plain), run(PLAIN))
    assert error < 2 * cost and error < 0.5 * tiny.relative_error(run(plain), wanted)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_added_before_quantizing_where_branches_are_not_wanted(tmp_path: Path) -> None:
    pairs = random_pairs(PLAIN)
    plan = plan_wan(ARCH, [request(tmp_path / "a.safetensors", pairs)], "int8", dynamic=False)
    model, loras = load_wan(ARCH, STATE, plan, "int8")
    merged, _ = load_wan(ARCH, merged_by_hand(STATE, (pairs, 1.0)), mm_type="int8")
    assert not branches(model) and tiny.relative_error(run(model), run(merged)) < 1e-3
    before = run(model)
    with pytest.raises(ConfigError, match="set it to true"):
        loras.switch(LoraPlan())
    assert torch.equal(run(model), before) and loras.plan is plan


def test_differences(tmp_path: Path) -> None:
    """Of weights, biases, norms and modulations: added, also where low-rank changes are beside codes."""
    names = {
        "diffusion_model.blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "diffusion_model.blocks.1.self_attn.k.diff_b": "blocks.1.self_attn.k.bias",
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "diffusion_model.blocks.1.self_attn.norm_k.diff": "blocks.1.self_attn.norm_k.weight",
        "diffusion_model.blocks.1.diff_m": "blocks.1.modulation",
        "diffusion_model.head.diff_m": "head.modulation",
        "diffusion_model.head.head.diff": "head.head.weight",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.time_projection.1.diff_b": "time_projection.1.bias",
    }
    generator = torch.Generator().manual_seed(3)
    deltas = {key: 0.3 * torch.randn(STATE[name].shape, generator=generator) for key, name in names.items()}
    pairs = random_pairs(PLAIN, ("self_attn.k", "ffn.0"))
    made = write_lora(tmp_path / "a.safetensors", pairs, rename=COMFY, **deltas)
    made = Request(made.path, strength=0.5)
    changed = {name: tensor + 0.5 * deltas[key] for key, name in names.items() for tensor in [STATE[name]]}
    wanted = by_hand((pairs, 0.5), state=STATE | changed)
    for dynamic in (False, True):
        model, loras = load_wan(ARCH, STATE, plan_wan(ARCH, [made], dynamic=dynamic))
        assert tiny.relative_error(run(model), wanted) < 2e-6
        loras.detach()
        assert torch.equal(run(model), run(load_wan(ARCH, STATE)[0]))
    full = write_lora(tmp_path / "b.safetensors", {}, **{f"{COMFY(LAYER)}.diff": torch.ones(128, 128)})
    plan = plan_wan(ARCH, [full], "int8")
    assert set(plan.added) == {f"{LAYER}.weight"}
    load_wan(ARCH, STATE, plan, "int8")
    with pytest.raises(CheckpointError, match=r"full difference.*--lora_path"):
        plan_wan(ARCH, [full], "int8", stored=[LAYER])


def test_bias_of_a_pair_is_scaled_as_it(tmp_path: Path) -> None:
    pair = random_pairs(PLAIN, ("self_attn.q",), alpha=2.0)[LAYER]
    bias = torch.randn(128)
    made = write_lora(tmp_path / "a.safetensors", {LAYER: pair}, **{f"{LAYER}.lora_B.bias": bias})
    state = STATE | {f"{LAYER}.bias": STATE[f"{LAYER}.bias"] + 2.0 / 4 * bias}
    model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], dynamic=True))
    assert tiny.relative_error(run(model), by_hand(({LAYER: pair}, 1.0), state=state)) < 2e-6


def test_rows_of_a_layer(tmp_path: Path) -> None:
    """Three layers of another layout in one of the model, in another order and with another rank each."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (32, 3), "b": (64, 5), "c": (32, 2)}
    pairs = {
        name: Pair(torch.randn(rank, 128, generator=generator), torch.randn(rows, rank, generator=generator) / 30)
        for name, (rows, rank) in sizes.items()
    }
    places = {"a": [Place("", 96, 128)], "b": [Place("", 0, 32, 32), Place("", 32, 64, 0)], "c": [Place("", 64, 96)]}
    made = write_lora(tmp_path / "a.safetensors", pairs, rename=lambda name: f"transformer.blocks.0.other.{name}")

    def aliases(name: str, shape: tuple[int, ...]) -> Any:
        if name == "blocks.0.self_attn.k.weight":
            for part, lies in places.items():
                yield from ((f"blocks.0.other.{part}.weight", place._replace(name=name)) for place in lies)

    product = torch.cat([pairs["b"].product[32:], pairs["b"].product[:32], pairs["c"].product, pairs["a"].product])
    state = STATE | {"blocks.0.self_attn.k.weight": STATE["blocks.0.self_attn.k.weight"] + product}
    wanted = by_hand(state=state)
    for dynamic in (False, True):
        with torch.device("meta"):
            module = WanDiT(ARCH)
        plan = plan_loras([made], module, aliases, dynamic=dynamic)
        for fuse in (False, True):
            model, _ = load_wan(ARCH, STATE, plan, fuse=fuse)
            assert tiny.relative_error(run(model), wanted) < 2e-6


@pytest.mark.parametrize("mm_type", ["Default", "int8", "fp8"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_is_loading(tmp_path: Path, mm_type: str, dynamic: bool | None, dtype: torch.dtype) -> None:
    """To another LoRA, to both, and back to none: bit-equal to a model that was loaded so."""
    first = request(tmp_path / "a.safetensors", random_pairs(PLAIN))
    second = request(tmp_path / "b.safetensors", random_pairs(PLAIN, ("self_attn.q", "ffn.0"), rank=20, seed=1))
    model, loras = load_wan(ARCH, STATE, plan_wan(ARCH, [first], mm_type, dynamic=dynamic), mm_type, dtype)
    for requests in ([second], [first, second], [], [Request(first.path, 0.3)], []):
        plan = plan_wan(ARCH, requests, mm_type, dynamic=dynamic)
        loras.switch(plan)
        loaded, _ = load_wan(ARCH, STATE, plan, mm_type, dtype)
        if (mm_type == "Default" and dynamic is None) or not requests:
            assert torch.equal(run(model, cast(dtype)), run(loaded, cast(dtype)))
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
        # room that is left from before changes the order of a sum
        assert tiny.relative_error(run(model, cast(dtype)), run(loaded, cast(dtype))) < 1e-2
    assert not branches(model)


@pytest.mark.parametrize("mm_type", ["Default", "int8"])
def test_fused_projections_stay_one_product(tmp_path: Path, mm_type: str) -> None:
    made = request(tmp_path / "a.safetensors", random_pairs(PLAIN, ("self_attn.q", "self_attn.v")))
    model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], mm_type, dynamic=True), mm_type)
    attention = model.blocks[0].self_attn
    whole = attention.q.of
    assert isinstance(whole, LowRankLinear) and attention.k.of is attention.v.of is whole
    assert whole.down.shape == (16, 128) and whole.up.shape == (3 * 128, 16)
    calls: list[nn.Module] = []
    whole.register_forward_hook(lambda *_: calls.append(whole))
    run(model)
    assert len(calls) == 1


def test_single_projections_are_quantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(PLAIN)
    made = request(tmp_path / "a.safetensors", pairs)
    model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], "int8"), "int8", fuse=False)
    base = model.blocks[0].self_attn.q.base
    assert isinstance(base, QuantLinear)
    calls: list[int] = []
    kernels, real = base.kernels, type(base.kernels).quantize
    monkeypatch.setattr(kernels, "quantize", lambda *a: (calls.append(1), real(kernels, *a))[1], raising=False)
    run(model)
    assert len(calls) == 2 * ARCH.num_layers  # q, k and v of self-attention; k and v of cross-attention


def test_feed_forward_keeps_its_gelu(tmp_path: Path) -> None:
    pairs = random_pairs(PLAIN, ("ffn.0",))
    made = request(tmp_path / "a.safetensors", pairs)
    x = torch.randn(1, 9, 128)
    state = merged_by_hand(STATE, (pairs, 1.0))
    middle = F.linear(x, state["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.bias"])
    middle = F.gelu(middle, approximate="tanh")
    wanted = F.linear(middle, state["blocks.0.ffn.2.weight"], state["blocks.0.ffn.2.bias"])
    for mm_type, limit in (("Default", 1e-6), ("int8", 0.02)):
        model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], mm_type, dynamic=True), mm_type)
        ffn = model.blocks[0].ffn
        assert isinstance(ffn[0], LowRankLinear) and not isinstance(ffn[2], LowRankLinear)
        with torch.no_grad():
            assert tiny.relative_error(feed_forward(x, ffn[0], ffn[2]), wanted) < limit


@pytest.mark.parametrize("mm_type", ["Default", "int8"])
def test_switching_compiles_nothing_again(tmp_path: Path, mm_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    of_block_1 = {name: pair for name, pair in random_pairs(PLAIN, rank=8).items() if name.startswith("blocks.1.")}
    first, second = of_block_1, random_pairs(PLAIN, ("self_attn.k", "ffn.2"), rank=14, seed=1)
    requests = [request(tmp_path / f"{i}.safetensors", pairs) for i, pairs in enumerate((first, second))]
    plans = [plan_wan(ARCH, [one], mm_type, dynamic=True) for one in requests]
    model, loras = load_wan(ARCH, STATE, plans[0], mm_type, uniform=True)
    compile_blocks(model)
    before = run(model)
    kept = [branch.down for branch in branches(model)]
    assert counter.frame_count == 1
    assert not loras.switch(plans[1])
    plain, _ = load_wan(ARCH, STATE, plans[1], mm_type)
    assert tiny.relative_error(run(model), run(plain)) < 1e-5
    loras.switch(plans[0])
    assert torch.equal(run(model), before)
    assert counter.frame_count == 1 and all(a is b.down for a, b in zip(kept, branches(model), strict=True))
    assert loras.detach()
    assert torch.equal(run(model), run(load_wan(ARCH, STATE, mm_type=mm_type)[0])) and counter.frame_count == 2
    loras.switch(plans[0])
    assert torch.equal(run(model), before) and counter.frame_count == 2
    torch._dynamo.reset()


def test_branches_move_with_their_block(tmp_path: Path) -> None:
    made = request(tmp_path / "a.safetensors", random_pairs(PLAIN))
    model, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [made], "int8"), "int8")
    buffers = {name for name, _ in model.blocks[0].named_buffers()}
    assert {"self_attn.q.whole.down", "self_attn.q.whole.up", "ffn.0.down", "ffn.0.up"} <= buffers
    model.blocks[0].to("meta")
    assert all(tensor.is_meta for tensor in (*model.blocks[0].buffers(), *model.blocks[0].parameters()))


def test_parts_that_are_read_once_are_never_branched(tmp_path: Path) -> None:
    pair = Pair(torch.randn(4, 24), torch.randn(128, 4))
    made = write_lora(tmp_path / "a.safetensors", {"text_embedding.0": pair})
    plan = plan_wan(ARCH, [made], dynamic=True)
    assert set(plan.added) == {"text_embedding.0.weight"} and not plan.beside
    model, _ = load_wan(ARCH, STATE, plan)
    assert tiny.relative_error(run(model), by_hand(({"text_embedding.0": pair}, 1.0))) < 1e-6


def test_switching_while_weights_are_away(tmp_path: Path) -> None:
    """What an offloader left without values: branches stay in memory from then on, weights are refused."""
    first = request(tmp_path / "a.safetensors", random_pairs(PLAIN))
    second = request(tmp_path / "b.safetensors", random_pairs(PLAIN, seed=1))
    changes = write_lora(tmp_path / "c.safetensors", {}, **{"blocks.0.diff_m": torch.ones(1, 6, 128)})
    model, loras = load_wan(ARCH, STATE, plan_wan(ARCH, [first], dynamic=True))
    plan, block = loras.plan, model.blocks[0]
    block.to("meta")
    with pytest.raises(ConfigError, match=r"'blocks.0.modulation' stays on disk"):
        loras.switch(plan_wan(ARCH, [changes], dynamic=True))
    assert loras.plan is plan
    wanted, _ = load_wan(ARCH, STATE, plan_wan(ARCH, [second], dynamic=True))
    assert not loras.switch(plan_wan(ARCH, [second], dynamic=True))
    for got, expected in zip(branches(model), branches(wanted), strict=True):
        assert torch.equal(got.down, expected.down) and torch.equal(got.up, expected.up)
    pair = Pair(torch.randn(4, 24), torch.randn(128, 4))
    once = write_lora(tmp_path / "d.safetensors", {"text_embedding.0": pair})
    model.text_embedding.to("meta")
    loras.switch(plan_wan(ARCH, [once], dynamic=True))
    ((_, tensor),) = loras.source.read(["text_embedding.0.weight"])
    torch.testing.assert_close(tensor, STATE["text_embedding.0.weight"] + pair.product)


@pytest.mark.parametrize("mm_type", ["Default", "int8"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("granularity", "lazy"), [("model", False), ("block", False), ("phase", False), ("block", True)]
)
def test_offloaded(tmp_path: Path, mm_type: str, dynamic: bool | None, granularity: Any, lazy: bool) -> None:
    """Bit-equal to the model that stays on the device, also once the LoRAs have been exchanged."""
    granularity, _, lazy = granularity.partition(", ")
    requests = [request(tmp_path / f"{seed}.safetensors", random_pairs(PLAIN, seed=seed)) for seed in (0, 1)]
    plans = [plan_wan(ARCH, made, mm_type, dynamic=dynamic) for made in (requests[:1], requests, [])]
    model = empty_model(WAN, ARCH, mm_type)
    source = LoraSource(DictSource(STATE), plans[0], CPU)
    loras = Loras(source, torch.float32)
    offloaded = load_offloaded(
        model,
        source,
        OffloadConfig(enabled=True, granularity=granularity, lazy_load=bool(lazy)),
        device=select_device("cpu"),
        dtype_of=lambda name: torch.float32,
        where="state",
        ready=loras.attach,
    )
    for plan in plans:
        if plan is not plans[0]:
            if lazy and plan.added:
                with pytest.raises(ConfigError, match=r"stays on disk"):
                    loras.switch(plan)
                return
            loras.switch(plan)
        with offloaded.running():
            got = run(model)
        assert torch.equal(got, run(load_wan(ARCH, STATE, plan, mm_type)[0]))
