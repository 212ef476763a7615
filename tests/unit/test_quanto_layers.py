"""Quanto's quantized layers: rounding, gradients, freezing, state dicts, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.errors import CheckpointError
from lightx2v.integrations import quanto
from lightx2v.quant.quanto import group_size, pack_rows, quanto_leaves, unpack_rows, weight_spec
from tests.unit.quanto_nets import WEIGHTS, calibrated, net, off, tokens

DTYPES = {"qfloat8": "fp8", "qint8": "int8", "qint4": "int4", "qint2": "int2"}


def linear(weights: str, n: int = 24, k: int = 160, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n).to(dtype))
    quanto.quantize(model, weights=weights)
    return model


def test_groups_are_the_largest_of_four_sizes_that_divides_a_row() -> None:
    sizes = {32: 0, 64: 0, 128: 0, 160: 32, 192: 96, 200: 0, 256: 128, 288: 96, 320: 64, 384: 128, 1000: 0, 4096: 128}
    assert {k: group_size(k) for k in sizes} == sizes


def test_rows_are_packed_one_above_the_other() -> None:
    codes = torch.tensor([[1, 2], [3, 0], [2, 1], [0, 3], [1, 1]], dtype=torch.uint8)
    packed = pack_rows(codes, 2)
    assert packed.tolist() == [[1 | 2 << 2 | 1 << 4, 2 | 1 << 2 | 1 << 4], [3 | 0 << 2, 0 | 3 << 2]]
    assert torch.equal(unpack_rows(packed, 2, 5), codes)
    assert pack_rows(codes, 4).tolist() == [[1 | 0 << 4, 2 | 3 << 4], [3 | 1 << 4, 0 | 1 << 4], [2, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "k"), [(4, 256), (4, 160), (2, 256), (2, 100)])
def test_few_bits_are_the_nearest_of_evenly_spaced_values(bits: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    layer = linear(f"qint{bits}", k=k, dtype=dtype)
    weight, size = layer[0].weight.detach().double(), group_size(k) or k
    rounded = layer[0].in_use.detach().double()
    groups, values = weight.unflatten(1, (-1, size)), rounded.unflatten(1, (-1, size))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(dtype).double()
    eps = torch.finfo(dtype).eps
    # A scale that was rounded down does not reach the largest value.
    limit = scale / 2 + (2**bits) * eps * scale + eps * weight.abs().max()
    assert ((groups - values).abs() <= limit).all()
    steps = (values - low) / scale
    assert ((steps - steps.round()).abs() <= 4 * eps * (1 + weight.abs().max() / scale)).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_constant_and_zero_rows_are_finite(kind: str) -> None:
    weight = torch.zeros(4, 256)
    weight[1], weight[2, 128:] = 3.0, -1.0
    model = nn.Sequential(nn.Linear(256, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    quanto.quantize(model, weights=kind)
    wanted = weight.sum(1)
    for _ in range(2):
        torch.testing.assert_close(model(torch.ones(1, 256))[0].detach(), wanted, rtol=0.01, atol=1e-5)
        quanto.freeze(model)
    leaves = quanto_leaves(weight, weight_spec(DTYPES[kind], 256))
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in leaves.values())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_pass_as_if_nothing_was_rounded(weights: str) -> None:
    model, x = linear(weights), torch.randn(7, 160, requires_grad=True)
    y = model(x)
    pull = torch.randn_like(y)
    y.backward(pull)
    rounded = model[0].in_use.detach()
    torch.testing.assert_close(y, F.linear(x, rounded, model[0].bias))
    torch.testing.assert_close(model[0].weight.grad, pull.T @ x.detach())
    torch.testing.assert_close(x.grad, pull @ rounded)
    assert not torch.equal(rounded, model[0].weight)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_training_moves_the_quantized_result(weights: str) -> None:
    model, x = linear(weights), torch.randn(64, 160)
    wanted = x @ torch.randn(160, 24) * 0.05
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    quanto.freeze(model)
    with torch.no_grad():
        assert F.mse_loss(model(x), wanted).item() < 0.6 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_frozen_gives_what_it_gave_before(weights: str, dtype: torch.dtype) -> None:
    model, x = net(dtype), tokens(dtype=dtype)
    quanto.quantize(model, weights=weights)
    before = model(x)
    quanto.freeze(model)
    assert off(model(x), before) < (1e-5 if dtype == torch.float32 else 0.02)
    assert all(parameter.ndim < 2 for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("streamline", [True, False])
@pytest.mark.parametrize("activations", ["qint8", "qfloat8"])
@pytest.mark.parametrize("weights", [*WEIGHTS, None])
def test_frozen_activations_give_what_they_gave_before(weights: str | None, activations: str, streamline: bool) -> None:
    model, x = net(), tokens()
    quanto.quantize(model, weights=weights, activations=activations)
    calibrated(model, streamline)
    before = model(x)
    quanto.freeze(model)
    assert off(model(x), before) < 1e-5


def test_frozen_layers_pass_gradients_on_to_their_input() -> None:
    model, x = linear("qint4"), torch.randn(3, 160, requires_grad=True)
    quanto.freeze(model)
    y = model(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, model[0].in_use.sum(0).expand(3, -1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_state_dict_comes_back(weights: str) -> None:
    model, x = net(), tokens()
    quanto.quantize(model, weights=weights)
    quanto.freeze(model)
    state, kinds = model.state_dict(), quanto.quantization_map(model)
    assert ("up.weight._data._data" in state) == (weights in ("qint4", "qint2")) and "up.weight" not in state
    fresh = net()
    for parameter in fresh.parameters():
        parameter.zero_()
    quanto.requantize(fresh, state, kinds)
    with torch.device("meta"):
        empty = net()
    quanto.requantize(empty, state, kinds)
    for other in (fresh, empty, copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
        assert all(torch.equal(tensor.float(), state[name].float()) for name, tensor in other.state_dict().items())


@torch.no_grad()
def test_unfrozen_state_dicts_are_plain() -> None:
    model, other = linear("qint4"), linear("qint4")
    assert model.state_dict().keys() == {"0.weight", "0.bias", "0.input_scale", "0.output_scale"}
    other[0].weight.zero_()
    quanto.freeze(other)
    other.load_state_dict(model.state_dict())
    assert not other[0].frozen and torch.equal(other(torch.ones(1, 160)), model(torch.ones(1, 160)))


def test_tensors_that_do_not_fit_are_named() -> None:
    model = linear("qint4")
    quanto.freeze(model)
    state, kinds = model.state_dict(), quanto.quantization_map(model)
    fewer = {name: tensor for name, tensor in state.items() if not name.endswith("_shift")}
    with pytest.raises(CheckpointError, match="_shift"):
        quanto.requantize(linear("qint4"), fewer, kinds)
    with pytest.raises(CheckpointError, match="a weight"):
        quanto.requantize(linear("qint4", n=25), state, kinds)
    with pytest.raises(CheckpointError, match=r"lacks 0\.bias"):
        quanto.requantize(linear("qint4"), {n: t for n, t in state.items() if n != "0.bias"}, kinds)
    with pytest.raises(CheckpointError, match="'1'"):
        quanto.requantize(linear("qint4"), state, {"1": {"weights": "qint4", "activations": "none"}})


@torch.no_grad()
def test_casting_a_frozen_model_keeps_its_codes() -> None:
    model, x = linear("qint8"), torch.randn(3, 160)
    quanto.freeze(model)
    before, wanted = model[0].state_dict()["weight._data"], model(x)
    model.to(torch.bfloat16)
    assert torch.equal(model[0].state_dict()["weight._data"], before)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16 and off(y, wanted) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("activations", [None, "qint8"])
def test_a_frozen_model_compiles_whole(activations: str | None) -> None:
    model, x = net(), tokens()
    quanto.quantize(model, weights="qint4", activations=activations, exclude="conv")
    calibrated(model)
    quanto.freeze(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result: Tensor = compiled(x)
    assert off(result, model(x)) < 1e-6
