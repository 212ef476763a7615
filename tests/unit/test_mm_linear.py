"""Linear layers with quantized weights: loading, errors, shapes, dtypes, and their place in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.mm.linear import ForceFP32Linear, QuantLinear, swap_linears
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.platform import DeviceInfo
from lightx2v.quant.numerics import quantize_weight

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
N, K = 136, 200
NAMES = [f"{kind}-{library}" for kind in ("int8", "fp8", "fp8-b128") for library in ("torch", "reference")]


def plan(name: str, mm_type: str, n: int = N, k: int = K) -> LayerPlan:
    return plan_layer(name, mm_type, parse(mm_type), n, k, device=CPU, fallback=False)


def empty(mm_type: str, bias: bool = True, auto_quant: bool = False) -> QuantLinear:
    scheme = parse(mm_type)
    return QuantLinear(K, N, bias, scheme, scheme.library, torch.bfloat16, auto_quant, name="blocks.0.q")


def tensors(mm_type: str, seed: int = 0) -> dict[str, Tensor]:
    spec = parse(mm_type).weight
    assert spec is not None
    torch.manual_seed(seed)
    codes, scale = quantize_weight(torch.randn(N, K) / K**0.5, spec)
    return {"weight": codes, "weight_scale": scale, "bias": torch.randn(N)}


def loaded(mm_type: str) -> QuantLinear:
    layer = empty(mm_type)
    for leaf, tensor in tensors(mm_type).items():
        layer.load_tensor(leaf, tensor)
    layer.finish()
    return layer


@pytest.mark.parametrize("mm_type", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_close_to_the_float_layer_for_any_leading_dims(mm_type: str, dtype: torch.dtype) -> None:
    layer = empty(mm_type, auto_quant=True)
    plain = nn.Linear(K, N)
    layer.load_tensor("weight", plain.weight.detach().to(torch.bfloat16))
    layer.load_tensor("bias", plain.bias.detach())
    layer.finish()
    x = torch.randn(2, 3, 5, K).to(dtype)
    with torch.inference_mode():
        got, wanted = layer(x), plain(x.float())
    assert got.dtype == dtype and got.shape == (2, 3, 5, N)
    assert (got.float() - wanted).norm() <= (0.02 if "int8" in mm_type else 0.05) * wanted.norm()
    # Sums of float products depend a little on how many rows there are.
    torch.testing.assert_close(layer(x.movedim(0, 2)), got.movedim(0, 2))
    torch.testing.assert_close(layer(x[0, 0, 0]), got[0, 0, 0], rtol=0.01, atol=0.001)
    assert layer(x[:, :, :0]).shape == (2, 3, 0, N)


@pytest.mark.parametrize("mm_type", NAMES)
def test_names_are_the_checkpoints_before_and_after(mm_type: str) -> None:
    given = tensors(mm_type)
    assert list(empty(mm_type).state_dict()) == list(given)
    state = loaded(mm_type).state_dict()
    for leaf, tensor in given.items():
        assert state[leaf].dtype == tensor.dtype and torch.equal(state[leaf].float(), tensor.float())


@pytest.mark.parametrize("mm_type", NAMES)
def test_quantizing_at_load_is_converting_before(mm_type: str) -> None:
    torch.manual_seed(0)
    layer = empty(mm_type, auto_quant=True)
    layer.load_tensor("bias", tensors(mm_type)["bias"])
    torch.manual_seed(0)
    layer.load_tensor("weight", torch.randn(N, K) / K**0.5)
    layer.finish()
    x = torch.randn(7, K)
    assert torch.equal(layer(x), loaded(mm_type)(x))


def test_the_bias_is_added_before_the_result_is_rounded() -> None:
    layer = loaded("int8-torch")
    assert layer.bias is not None
    layer.bias.fill_(1 + 2.0**-12)  # not a bfloat16
    bare = loaded("int8-torch")
    bare.bias = None
    x = torch.randn(64, K, dtype=torch.bfloat16)
    assert torch.equal(layer(x), (bare(x.float()) + layer.bias).bfloat16())


def test_a_dtype_change_or_autocast_leaves_codes_and_scales_alone() -> None:
    for mm_type in NAMES:
        layer = loaded(mm_type)
        x = torch.randn(9, K)
        before = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), before)
        layer.bias = None
        without = layer(x)
        assert torch.equal(layer.to(torch.bfloat16)(x), without)


def test_bytes_are_those_of_the_packed_weight() -> None:
    assert empty("int8-reference").weight_bytes == N * K + 4 * N
    assert loaded("int8-reference").weight_bytes == N * K + 4 * N
    assert loaded("int8-torch").weight_bytes == N * K + 4 * N
    assert loaded("fp8-torch").weight_bytes <= 2 * N * K + 4 * N


@pytest.mark.parametrize("mm_type", NAMES)
def test_compiles_without_a_graph_break(mm_type: str) -> None:
    layer = loaded(mm_type)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, K, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_groups_are_whole_when_compiled() -> None:
    """Inductor of torch 2.13 miscompiles groups that the end of a row cuts off."""
    layer = loaded("fp8-b128-torch")
    codes, scale = layer.kernels.quantize(layer.scheme, torch.randn(3, K), layer.packed)
    assert codes.shape == (3, 256) and scale.shape == (3, 2)


def refusal(mm_type: str, given: dict[str, Tensor], auto_quant: bool = False) -> str:
    layer = empty(mm_type, auto_quant=auto_quant)
    with pytest.raises(CheckpointError) as error:
        for leaf, tensor in given.items():
            layer.load_tensor(leaf, tensor)
        layer.finish()
    assert "blocks.0.q" in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_refused_by_name() -> None:
    int8, fp8, block = tensors("int8"), tensors("fp8"), tensors("fp8-b128")
    without_scale = {leaf: tensor for leaf, tensor in int8.items() if leaf != "weight_scale"}
    assert "missing: weight_scale" in refusal("int8-torch", without_scale)
    assert "missing: weight" in refusal("int8-torch", {"bias": int8["bias"]})
    assert "is int8, the layer wants float8_e4m3fn" in refusal("fp8-torch", int8)
    assert "is float8_e4m3fn, the layer wants int8" in refusal("int8-torch", fp8)
    assert "shape [2, 2], the layer wants [136, 1]" in refusal("fp8-torch", block)
    assert "shape [136, 1], the layer wants [2, 2]" in refusal("fp8-b128-torch", fp8)
    assert "shape [200, 136], the layer wants [136, 200]" in refusal("int8-torch", {**int8, "weight": int8["weight"].T})
    assert "inf or NaN" in refusal("int8-torch", {**int8, "weight_scale": int8["weight_scale"] / 0})
    assert "'weight_scale' is int32" in refusal("int8-torch", {**int8, "weight_scale": int8["weight_scale"].int()})
    assert "'scale_input' is not part" in refusal("int8-torch", {**int8, "scale_input": torch.ones(1)})
    floats = {**int8, "weight": torch.randn(N, K)}
    assert "set weight_auto_quant" in refusal("int8-torch", floats)
    assert "not quantized" in refusal("int8-torch", floats, auto_quant=True)


def test_a_flat_channel_scale_in_half_precision_is_taken() -> None:
    given = tensors("int8")
    layer = empty("int8-torch")
    half = given["weight_scale"].bfloat16().reshape(-1)
    for leaf, tensor in {**given, "weight_scale": half}.items():
        layer.load_tensor(leaf, tensor)
    layer.finish()
    assert torch.equal(layer.state_dict()["weight_scale"], half.float().reshape(-1, 1))


def test_running_before_finish_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="finish"):
        empty("int8-torch")(torch.zeros(1, K))


def test_swap_replaces_by_full_name_and_leaves_default() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Sequential(nn.Linear(K, N), nn.GELU()), nn.Linear(N, K, bias=False), nn.Linear(K, N))
    kept = model[2]
    plans = {"0.0": plan("0.0", "int8"), "1": plan("1", "Default-Force-FP32", K, N), "2": plan("2", "Default")}
    swap_linears(model, plans, torch.bfloat16, auto_quant=True)
    first, second = model[0][0], model[1]
    assert isinstance(first, QuantLinear) and first.library == "onednn" and model[2] is kept
    assert isinstance(second, ForceFP32Linear) and second.bias is None
    second.load_tensor("weight", torch.ones(K, N, dtype=torch.bfloat16))
    second.finish()
    out = second(torch.full((2, N), 1 + 2.0**-7, dtype=torch.bfloat16))
    assert second.weight.dtype == torch.float32 and out.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="not part of this layer"):
        second.load_tensor("weight_scale", torch.ones(K, 1))


@pytest.mark.parametrize("name", ["1", "missing"])
def test_swap_refuses_what_is_no_such_linear(name: str) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.GELU())
    with pytest.raises(ConfigError, match=f"'{name}' is no linear layer"):
        swap_linears(model, {name: plan(name, "int8")}, torch.bfloat16, auto_quant=False)
    with pytest.raises(ConfigError, match="'0' is no linear layer"):
        swap_linears(model, {"0": plan("0", "int8", n=N + 1)}, torch.bfloat16, auto_quant=False)
