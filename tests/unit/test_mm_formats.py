"""Layers in microscaling, nvfp4, static fp8, int4 and gguf formats: every way that checkpoints hold them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.mm import MM_WEIGHT_REGISTER
from lightx2v.mm.fused import fuse_projections
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.mm.together import project
from lightx2v.platform import DeviceInfo
from lightx2v.quant.formats import dequantize_leaves, quantize_leaves, read_leaves, scale_bytes, written_leaves
from lightx2v.quant.layouts import Stored, find_layout, layouts_of
from lightx2v.quant.packing import swap_halves, swizzle
from tests.numerics.definitions import bits
from tests.numerics.test_packing import marlin

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
N, K = 200, 256
SHORT = ("fp8-pertensor", "mxfp8", "mxfp6-mxfp8", "mxfp4", "nvfp4", "int4-g128")
SHORT += ("int4-w4a4", "int3-g64-asym", "int8-g64", "int8-channel-asym", "nf4", "nf4-double")
NAMES = [f"{kind}-{library}" for kind in (*SHORT, "gguf-Q4_0", "gguf-BF16") for library in ("dequantize", "reference")]


def empty(mm_type: str, auto_quant: bool = False, n: int = N, k: int = K, bias: bool = True) -> QuantLinear:
    scheme = parse(mm_type)
    library = "dequantize" if scheme.library == "auto" else scheme.library
    return QuantLinear(k, n, bias, scheme.with_library(library), library, torch.bfloat16, auto_quant, name="blocks.0.q")


def weight(n: int = N, k: int = K, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / 16


def stored(mm_type: str, n: int = N, k: int = K, seed: int = 0) -> dict[str, Tensor]:
    """As LightX2V stores it."""
    spec = parse(mm_type).weight
    assert spec is not None
    return written_leaves(quantize_leaves(weight(n, k, seed), spec), spec)


def loaded(mm_type: str, given: dict[str, Tensor], n: int = N, k: int = K) -> QuantLinear:
    layer = empty(mm_type, n=n, k=k, bias="bias" in given)
    for leaf, tensor in given.items():
        layer.load_tensor(leaf, tensor)
    layer.finish()
    return layer


@pytest.mark.parametrize("mm_type", NAMES)
def test_quantizing_at_load_is_converting_before(mm_type: str) -> None:
    given = {**stored(mm_type), "bias": torch.randn(N)}
    layer, automatic = loaded(mm_type, given), empty(mm_type, auto_quant=True)
    automatic.load_tensor("weight", weight())
    automatic.load_tensor("bias", given["bias"])
    automatic.finish()
    x = torch.randn(2, 7, K, dtype=torch.bfloat16)
    out = layer(x)
    assert out.shape == (2, 7, N) and out.dtype == x.dtype and torch.equal(automatic(x), out)
    assert torch.equal(layer(x[:, :0]), x.new_zeros(2, 0, N))
    exact = x.float() @ weight().T + given["bias"]
    assert (out.float() - exact).norm() <= 0.15 * exact.norm()
    state = layer.state_dict()
    assert state.keys() == given.keys() and list(empty(mm_type).state_dict()) == list(given)
    for leaf, tensor in given.items():
        assert state[leaf].dtype == tensor.dtype and state[leaf].shape == tensor.shape
        assert torch.equal(state[leaf].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), leaf


@pytest.mark.parametrize("mm_type", NAMES)
def test_compiles_moves_and_ignores_autocast(mm_type: str) -> None:
    layer = loaded(mm_type, stored(mm_type))
    x = torch.randn(3, 4, K, dtype=torch.bfloat16)
    torch._dynamo.reset()
    with torch.no_grad():
        before = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), before)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x.float()), layer.to(torch.float16)(x.float()))
        assert torch.equal(layer(x), before)


def nvfp4_ways() -> dict[str, dict[str, Tensor]]:
    """The same nvfp4 layer with a calibrated input scale, as each tool stores it."""
    n, k, absmax = 128, 256, torch.tensor(7.0)
    made = quantize_leaves(weight(n, k), parse("nvfp4").weight)  # type: ignore[arg-type]
    codes, scale, factor = made["weight"], made["weight_scale"], 1 / made["weight_global_scale"]
    input_scale = absmax / 2688
    mark = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    lightx2v = {"weight": codes, "weight_scale": swizzle(scale), "weight_global_scale": made["weight_global_scale"]}
    comfy = {"weight": swap_halves(codes), "weight_scale": swizzle(scale), "weight_scale_2": factor}
    calibrated = {"input_global_scale": 1 / input_scale, "alpha": factor * input_scale}
    return {
        "converted": {**lightx2v, "input_absmax": absmax},
        "with plain scales": {**lightx2v, "weight_scale": scale, "input_absmax": absmax.reshape(1)},
        "calibrated": {"weight": codes, "weight_scale": swizzle(scale), **calibrated},
        "ComfyUI": {**comfy, "input_scale": input_scale, "comfy_quant": mark},
        "ComfyUI, no mark": {**comfy, "input_scale": input_scale.reshape(1)},
    }


def test_nvfp4_is_the_same_from_every_tool() -> None:
    """16 groups of 16 fill four columns of tiles: for plain scales N is no multiple of 128."""
    x = torch.randn(5, 256)
    outs = {}
    for way, given in nvfp4_ways().items():
        if way != "with plain scales":
            outs[way] = loaded("nvfp4-reference", given, 128, 256)(x)
    wanted = outs.pop("converted")
    assert len(outs) == 3
    for out in outs.values():
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    without = {leaf: t for leaf, t in nvfp4_ways()["converted"].items() if leaf != "input_absmax"}
    assert not torch.equal(loaded("nvfp4-reference", without, 128, 256)(x), wanted), "the input's own scale"


@pytest.mark.parametrize("mm_type", ["mxfp8", "mxfp6-mxfp8", "mxfp4", "nvfp4"])
def test_plain_and_swizzled_scales_are_told_by_their_shape(mm_type: str) -> None:
    spec = parse(mm_type).weight
    assert spec is not None
    made = quantize_leaves(weight(), spec)
    plain, mixed = {**written_leaves(made, spec), "weight_scale": made["weight_scale"]}, written_leaves(made, spec)
    assert plain["weight_scale"].shape != mixed["weight_scale"].shape
    x = torch.randn(5, K)
    assert torch.equal(loaded(mm_type, plain)(x), loaded(mm_type, mixed)(x))
    # ModelOpt's nvfp4: plain scales, codes in the usual order.
    if mm_type == "nvfp4":
        other = {"weight": plain["weight"], "weight_scale": plain["weight_scale"]}
        other["weight_scale_2"] = 1 / made["weight_global_scale"]
        torch.testing.assert_close(loaded(mm_type, other)(x), loaded(mm_type, mixed)(x), rtol=0.01, atol=0.01)


def test_mxfp8_of_other_tools() -> None:
    """Where the shape does not tell: bytes as scales of e4m3 codes are plain, unless ComfyUI has marked them."""
    spec = parse("mxfp8").weight
    assert spec is not None
    made = quantize_leaves(weight(128, 128), spec)
    scale = made["weight_scale"]
    mark = torch.tensor(list(b'{"format": "mxfp8", "full_precision_matrix_mult": false}'), dtype=torch.uint8)
    ways = [
        {"weight": made["weight"], "weight_scale": scale.view(torch.uint8)},  # msModelSlim, ModelOpt
        {"weight": made["weight"], "weight_scale": swizzle(scale).view(torch.uint8), "comfy_quant": mark},
        {"weight": made["weight"], "weight_scale": swizzle(scale)},
        {"weight": made["weight"].view(torch.uint8), "weight_scale": swizzle(scale)},  # LightX2V
    ]
    for given in ways:
        read = read_leaves(given, spec, 128, 128, "here")
        assert torch.equal(dequantize_leaves(read, spec), dequantize_leaves(made, spec))


def test_fp8_under_one_scale_in_every_spelling() -> None:
    spec, x = parse("fp8-pertensor").weight, torch.randn(5, K)
    assert spec is not None
    given = stored("fp8-pertensor")
    codes, scale, static = given["weight"], given["weight_scale"], torch.tensor(0.02)
    assert scale.shape == ()
    wanted = loaded("fp8-pertensor", {**given, "input_scale": static})(x)
    assert not torch.equal(wanted, loaded("fp8-pertensor", given)(x))
    for way in (
        {"weight": codes, "scale_weight": scale.reshape(1), "scale_input": static},
        {"weight": codes, "weight_scale": scale.expand(1, N), "input_scale": static.reshape(1)},
        {"weight": codes, "weight_scale": scale.expand(N), "input_scale": static},
    ):
        torch.testing.assert_close(loaded("fp8-pertensor", way)(x), wanted, rtol=1e-5, atol=1e-6)
    rows = torch.rand(1, N) + 0.5
    by_row = loaded("fp8-pertensor-reference", {"weight": codes, "weight_scale": rows * scale})(x)
    whole = loaded("fp8-pertensor-reference", {"weight": codes, "weight_scale": scale})(x)
    torch.testing.assert_close(by_row, whole * rows)
    automatic = empty("fp8-pertensor", auto_quant=True, bias=False)
    automatic.load_tensor("input_scale", static)
    automatic.load_tensor("weight", weight())
    automatic.finish()
    assert torch.equal(automatic(x), wanted), "a float checkpoint may have been calibrated"


def test_int4_prepacked_for_marlin() -> None:
    n, k = 128, 256
    given = stored("int4-g128", n, k)
    packed, scale = marlin(torch.from_numpy(bits(given["weight"], 4)).T, given["weight_scale"].T.contiguous())
    theirs = {"weight": packed, "weight_scale": scale.half(), "weight_workspace": torch.zeros(16).int()}
    layer = loaded("int4-g128", theirs, n, k)
    x = torch.randn(5, k)
    plain = loaded("int4-g128", {**given, "weight_scale": given["weight_scale"].half()}, n, k)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.state_dict()["weight"], given["weight"])


def refusal(mm_type: str, given: dict[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as error:
        loaded(mm_type, given)
    assert str(error.value).startswith("blocks.0.q: ")
    return str(error.value)


def test_what_does_not_fit_is_refused_by_name() -> None:
    four, six, nv = stored("mxfp4"), stored("mxfp6-mxfp8"), stored("nvfp4")
    assert "'weight' has shape [200, 192], the layer wants [200, 128]" in refusal("mxfp4", six)
    assert "'weight_scale' has shape [256, 16]" in refusal("mxfp4", nv)
    assert "'weight_global_scale' is not part" in refusal("mxfp4", {**four, "weight_global_scale": torch.ones(())})
    without = {leaf: t for leaf, t in nv.items() if leaf != "weight_global_scale"}
    assert "weight, weight_scale, input_global_scale, alpha" in refusal("nvfp4", without)
    assert "missing: weight_scale" in refusal("mxfp8", {"weight": stored("mxfp8")["weight"]})
    assert "inf or NaN" in refusal("nvfp4", {**nv, "weight_global_scale": torch.tensor(float("inf"))})
    bad = four["weight_scale"].view(torch.uint8).clone()
    bad[0, 0] = 255
    assert "'weight_scale' holds inf or NaN" in refusal("mxfp4", {**four, "weight_scale": bad})
    assert "is float32, the layer wants float8_e8m0fnu or uint8" in refusal(
        "mxfp4", {**four, "weight_scale": torch.ones(256, 8)}
    )
    assert "set weight_auto_quant" in refusal("mxfp4", {"weight": weight()})
    for said in ({"format": "nvfp4"}, {"format": "mxfp8", "convrot": True}, {}):
        mark = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        assert "'comfy_quant' says" in refusal("mxfp8", {**stored("mxfp8"), "comfy_quant": mark})
    with pytest.raises(CheckpointError, match=r"llama\.cpp"):
        empty("gguf-Q4_K", auto_quant=True).load_tensor("weight", weight())
    with pytest.raises(CheckpointError, match="do not divide K"):
        empty("gguf-Q4_0", auto_quant=True, k=40).load_tensor("weight", weight(k=40))


@pytest.mark.parametrize("mm_type", [*SHORT, "gguf-Q4_0"])
def test_bytes_per_weight(mm_type: str) -> None:
    layer, spec = loaded(mm_type, stored(mm_type, 512, 1024), 512, 1024), parse(mm_type).weight
    assert spec is not None
    most: Any = {"fp8-pertensor": 0.51, "mxfp8": 0.516, "mxfp6-mxfp8": 0.4}
    most = {**most, "int8-g64": 0.54, "int8-channel-asym": 0.51, "int4-w4a4": 0.32, "nf4": 0.32}.get(mm_type, 0.29)
    assert layer.weight_bytes <= most * 2 * 512 * 1024
    code_bytes = layer.kernels.code_bytes(layer.scheme, CPU)
    assert layer.weight_bytes == 512 * 1024 * code_bytes + scale_bytes(spec, 512, 1024)


@pytest.mark.parametrize("name", [*SHORT, "nvfp4-split-n-workaround", "gguf-Q8_0", "gguf-Q5_0"])
def test_lightx2vs_interface(name: str) -> None:
    spec = parse(name).weight
    assert spec is not None
    automatic = MM_WEIGHT_REGISTER[name]("a.weight", "a.bias")
    automatic.set_config({"weight_auto_quant": True})
    automatic.load({"a.weight": weight(), "a.bias": torch.ones(N)})
    codes = {f"a.{leaf}": tensor for leaf, tensor in stored(name).items()}
    read = MM_WEIGHT_REGISTER[name]("a.weight", "a.bias")
    read.load({**codes, "a.bias": torch.ones(N)})
    x = torch.randn(3, 4, K, dtype=torch.bfloat16)
    assert torch.equal(read.apply(x), automatic.apply(x))


def test_headers_tell_one_scheme_from_another() -> None:
    for mm_type in SHORT:
        spec = parse(mm_type).weight
        assert spec is not None
        told = {leaf: Stored(tensor.dtype, tuple(tensor.shape)) for leaf, tensor in stored(mm_type).items()}
        fitting = [name for name in (*SHORT, "int8", "fp8", "fp8-b128") if find_layout(parse(name).weight, N, K, told)]  # type: ignore[arg-type]
        # Four bits in blocks of 64 may be either: the file says which.
        alike = ["int4-w4a4", "nf4"]
        assert fitting == (alike if mm_type in alike else [mm_type])
        required = {leaf for leaf, form in layouts_of(spec, N, K)[0].items() if form.required}
        assert required == set(told)


class Attention(nn.Module):
    fused = (("q", "k"),)

    def __init__(self, q: nn.Module, k: nn.Module) -> None:
        super().__init__()
        self.q, self.k = q, k


@pytest.mark.parametrize("mm_type", [*SHORT, "gguf-Q4_0"])
@pytest.mark.parametrize("n", [128, 200])
def test_layers_are_put_together_only_where_their_scales_allow(mm_type: str, n: int) -> None:
    first, second = (loaded(mm_type, stored(mm_type, n, K, seed), n) for seed in (1, 2))
    x = torch.randn(2, 3, K, dtype=torch.bfloat16)
    wanted = [first(x), second(x)]
    for got, want in zip(project(x, first, second), wanted, strict=True):
        assert torch.equal(got, want)
    attention = Attention(first, second)
    count = fuse_projections(attention)
    stacks = {"mxfp8": 128, "mxfp6-mxfp8": 128, "mxfp4": 128, "int4-g128": 1}
    stacks |= {name: 1 for name in ("int4-w4a4", "int3-g64-asym", "int8-g64", "int8-channel-asym", "nf4")}
    assert count == int(mm_type in stacks and n % stacks[mm_type] == 0)
    for got, want in zip(project(x, attention.q, attention.k), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_inputs_with_scales_of_their_own_are_quantized_apart() -> None:
    first, second = (
        loaded("nvfp4-reference", {**stored("nvfp4", seed=seed), "input_absmax": torch.tensor(absmax)})
        for seed, absmax in ((1, 4.0), (2, 40.0))
    )
    x = torch.randn(3, K)
    assert not first.quantizes_as(second)
    for got, layer in zip(project(x, first, second), (first, second), strict=True):
        assert torch.equal(got, layer(x))


def test_the_plan_says_what_is_won() -> None:
    planned = plan_layer("q", "mxfp4", parse("mxfp4"), N, K, device=CPU, fallback=False)
    assert planned.library == "dequantize" and "memory won, speed not" in planned.reason
    assert plan_layer("q", "nvfp4-reference", parse("nvfp4-reference"), N, K, device=CPU, fallback=False)
