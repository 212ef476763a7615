"""`DynamicDiTQuantizer`: its five types against float64, on any shape and dtype; what it leaves alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.integrations.diffusers import DynamicDiTQuantizer
from lightx2v.integrations.linear import MovableLinear
from lightx2v.quant.numerics import FP8_MAX
from tests.unit.angelslim_nets import BLOCKS, TYPES, Block, Net, defined, relative, seeded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(200,), (1, 200), (33, 200), (2, 1, 200), (2, 100, 200), (3, 2, 5, 200)]


def converted(quant_type: str, model: nn.Module | None = None, **options: object) -> nn.Module:
    model = seeded(Block) if model is None else model
    everything = {"include_patterns": [], "exclude_patterns": []}
    DynamicDiTQuantizer(quant_type, **everything | options).convert_linear(model)  # type: ignore[arg-type]
    return model


def layers(model: nn.Module) -> dict[str, MovableLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MovableLinear)}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("native", [None, True, False])
@pytest.mark.parametrize("quant_type", TYPES)
@torch.no_grad()
def test_every_type_is_its_definition_for_any_shape_and_dtype(quant_type: str, native: bool | None) -> None:
    layer = layers(converted(quant_type, native_fp8_support=native))["up"]
    for dtype in DTYPES:
        for shape in SHAPES:
            x = numbers(*shape, dtype=dtype)
            got = layer(x)
            assert got.dtype == dtype and got.shape == (*shape[:-1], 136)
            limit = 0.002 if dtype == torch.float16 else 0.004
            assert relative(got, defined(layer, x, quant_type)) < limit, (dtype, shape)
    assert layer(numbers(0, 200)).shape == (0, 136)


@pytest.mark.parametrize("quant_type", TYPES)
@torch.no_grad()
def test_native_and_fallback_give_the_same(quant_type: str) -> None:
    native, fallback = (converted(quant_type, native_fp8_support=flag) for flag in (True, False))
    assert all(
        torch.equal(a, b) for a, b in zip(native.state_dict().values(), fallback.state_dict().values(), strict=True)
    )
    for dtype in DTYPES:
        for batch, tokens in ((1, 1), (2, 7), (3, 130)):
            x = numbers(batch, tokens, 200, dtype=dtype)
            assert relative(layers(native)["up"](x), layers(fallback)["up"](x)) < 0.004


@torch.no_grad()
def test_defect_1_blocks_without_native_support_take_any_number_of_tokens() -> None:
    """AngelSlim quantizes their activations in blocks of 128 tokens, which its product refuses."""
    layer = layers(converted("fp8-per-block", native_fp8_support=False))["up"]
    for tokens in (1, 2, 32, 100, 128, 256):
        x = numbers(1, tokens, 200, dtype=torch.bfloat16)
        assert relative(layer(x), defined(layer, x, "fp8-per-block")) < 0.004


@pytest.mark.parametrize("quant_type", ["fp8-per-token", "fp8-per-token-sgl"])
@torch.no_grad()
def test_defect_2_tokens_of_a_batch_keep_their_shape(quant_type: str) -> None:
    """AngelSlim returns [1, batch * tokens, N], to which the residual does not add."""
    plain = seeded(Block).bfloat16()
    model = converted(quant_type, copy.deepcopy(plain))
    x = numbers(2, 32, 200, dtype=torch.bfloat16)
    assert relative(model(x), plain(x)) < 0.02
    alone = torch.cat([model(part) for part in x.split(1)])
    assert relative(model(x), alone) < 0.002


@pytest.mark.parametrize("quant_type", TYPES)
@torch.no_grad()
def test_defect_3_small_and_zero_float16_activations(quant_type: str) -> None:
    """In float16 448 / amax overflows below 0.00684: AngelSlim's result is 0 there, and NaN for zeros."""
    plain = seeded(Block).half()
    layer = layers(converted(quant_type, copy.deepcopy(plain)))["up"]
    layer.inner.bias = None
    for size in (6e-3, 1e-4, 1e-6):
        x = numbers(2, 9, 200).mul(size).half()
        wanted = x.float() @ plain.up.weight.float().T
        assert relative(layer(x), wanted) < 0.06 + 1e-8 / size
    zeros = layer(torch.zeros(2, 9, 200, dtype=torch.float16))
    assert torch.equal(zeros, torch.zeros(2, 9, 136, dtype=torch.float16))
    small = layers(converted(quant_type, _scaled(plain, 1e-3)))["up"]
    small.inner.bias = None
    x = numbers(2, 9, 200).half()
    assert relative(small(x), x.float() @ (plain.up.weight.float().T * 1e-3)) < 0.06


def _scaled(model: nn.Module, factor: float) -> nn.Module:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.mul_(factor)
    return model


@torch.no_grad()
def test_defect_4_scales_in_float32_are_nearer() -> None:
    """AngelSlim's scales are bfloat16: 0.02661 off for these weights, float32 ones 0.02644. Ours are either."""
    linear = nn.Linear(1000, 1000)
    linear.weight.copy_(numbers(1000, 1000, seed=0))
    errors = {}
    for rounding in ("angelslim", "float32"):
        model = converted("fp8-per-tensor", nn.Sequential(copy.deepcopy(linear).bfloat16()), rounding=rounding)
        state = model.state_dict()
        values = state["0.weight"].double() * state["0.weight_scale"].double()
        errors[rounding] = relative(values, linear.weight.bfloat16())
    assert errors["float32"] < errors["angelslim"]
    exact = linear.weight.bfloat16().double()
    scale = exact.abs().max() / FP8_MAX
    best = relative((exact / scale).float().to(torch.float8_e4m3fn).double() * scale, exact)
    assert errors["float32"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("quant_type", TYPES)
def test_a_compiled_model_is_one_graph(quant_type: str) -> None:
    model = converted(quant_type, seeded(Block).bfloat16())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (5, 9):
            x = numbers(2, tokens, 200, dtype=torch.bfloat16)
            assert relative(compiled(x), model(x)) < 0.01


def test_only_the_layers_it_names_change() -> None:
    model = seeded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantizer = DynamicDiTQuantizer("fp8-per-token")
    quantizer.convert_linear(model)
    after = model.state_dict()
    assert list(layers(model)) == BLOCKS
    for name in before:
        if not name.startswith("blocks") or name.endswith("bias"):
            assert after[name].dtype == torch.float32 and torch.equal(after[name], before[name])
    assert {after[f"{name}.weight"].dtype for name in BLOCKS} == {torch.float8_e4m3fn}
    assert {name: scale.shape for name, scale in quantizer.fp8_scales_map.items()} == {
        f"{name}.weight_scale": (200 if name.endswith("down") else 136, 1) for name in BLOCKS
    }


def test_the_report_says_what_and_why() -> None:
    quantizer = DynamicDiTQuantizer("fp8-per-token-sgl")
    quantizer.convert_linear(seeded())
    report = quantizer.report
    assert report is not None
    assert report.skipped == {
        "patch_embed": "excluded by 'embed'",
        "head": "matches no pattern of include_patterns",
    }
    assert list(report.matched) == BLOCKS and all(plan.reason for plan in report.matched.values())
    said = str(report)
    assert "4 linear layers quantized, 2 not" in said and "not head: matches no pattern" in said


def test_casts_and_moves_keep_codes_scales_and_bias() -> None:
    model = converted("fp8-per-token")
    before, x = copy.deepcopy(model.state_dict()), numbers(4, 200)
    with torch.no_grad():
        wanted = model(x)
        for cast in (torch.bfloat16, torch.float16):
            model.to(cast)
            state = model.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
            assert torch.equal(model(x), wanted)
            assert model(x.to(cast)).dtype == cast
    assert model.up.weight.dtype == torch.float32 and model.up.bias.dtype == torch.float32
    assert relative(model.up.weight, seeded(Block).up.weight) < 0.03
    twin = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(twin, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), wanted)


def test_a_layer_that_a_model_has_twice_stays_one() -> None:
    model = nn.ModuleDict({"block_a": nn.Linear(16, 16), "block_b": nn.Identity()})
    model["block_b"] = model["block_a"]
    DynamicDiTQuantizer().convert_linear(model)
    assert isinstance(model["block_a"], MovableLinear) and model["block_a"] is model["block_b"]


def test_layers_that_others_compute_with_stay() -> None:
    model = nn.ModuleDict({"block": nn.MultiheadAttention(16, 2, batch_first=True)})
    quantizer = DynamicDiTQuantizer()
    with torch.no_grad():
        quantizer.convert_linear(model)
        model["block"](*3 * [numbers(1, 4, 16)])
    assert quantizer.report is not None and "way of its own" in quantizer.report.skipped["block.out_proj"]


@pytest.mark.parametrize("name", ["fp8", "fp8-per-tensr", "int8", ""])
def test_unknown_types_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="fp8-per-token-sgl"):
        DynamicDiTQuantizer(name)


def test_a_model_without_weights_and_weights_without_scales_are_refused() -> None:
    with pytest.raises(CheckpointError, match="load the weights first"):
        DynamicDiTQuantizer().convert_linear(Net().to("meta"))
    model = seeded()
    model.blocks[0].up.weight = nn.Parameter(
        model.blocks[0].up.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(CheckpointError, match=r"blocks\.0\.up.*float8_e4m3fn"):
        DynamicDiTQuantizer().convert_linear(model)


def test_native_support_is_what_the_caller_says_or_the_device_has() -> None:
    assert DynamicDiTQuantizer(native_fp8_support=True).native_fp8_support is True
    assert DynamicDiTQuantizer(native_fp8_support=False).native_fp8_support is False
    assert isinstance(DynamicDiTQuantizer().native_fp8_support, bool)
