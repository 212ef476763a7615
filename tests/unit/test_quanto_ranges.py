"""Learned ranges of 4 and 2 bits: their values, gradients and files; codes that are solved with the inputs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.errors import ConfigError
from lightx2v.integrations import quanto
from tests.unit.quanto_nets import Net, net, off, tokens

FEW = ("qint4", "qint2")


def moved(weights: str, dtype: torch.dtype = torch.float32) -> Net:
    """With ranges that are not those of the weights: narrower by a part that differs, and shifted."""
    model = net(dtype)
    quanto.quantize(model, weights=weights)
    quanto.learn_ranges(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight_scale", "weight_low")):
                parameter.mul_(0.7 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model


@torch.no_grad()
@pytest.mark.parametrize("weights", FEW)
def test_learned_ranges_start_where_the_weights_have_them(weights: str) -> None:
    model = net()
    quanto.quantize(model, weights=weights)
    before = model(tokens())
    quanto.learn_ranges(model)
    assert torch.equal(model(tokens()), before)
    learned = {name for name, _ in model.named_parameters() if name.startswith("up.")}
    assert learned == {"up.weight", "up.bias", "up.weight_scale", "up.weight_low"}
    assert model.up.weight_scale.shape == (64, 5)


@torch.no_grad()
@pytest.mark.parametrize("weights", FEW)
def test_values_are_the_nearest_of_the_range(weights: str) -> None:
    model = moved(weights)
    assert isinstance(model.up, quanto.QuantizedLinear) and model.up.in_use is not None
    weight, levels = model.up.weight.double().unflatten(1, (5, 32)), 4 if weights == "qint2" else 16
    scale, low = (part.double()[:, :, None] for part in (model.up.weight_scale, model.up.weight_low))
    grid = low[..., None] + scale[..., None] * torch.arange(levels).double()  # [N, G, 1, levels]
    wanted = grid.expand(-1, -1, 32, -1).gather(3, (weight[..., None] - grid).abs().argmin(3, keepdim=True)).squeeze(3)
    torch.testing.assert_close(model.up.in_use.double(), wanted.flatten(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weights", FEW)
def test_gradients_of_ranges_are_exact(weights: str) -> None:
    model, x = moved(weights), tokens(rows=7)
    layer = model.up
    pull = torch.randn(7, 64, generator=torch.Generator().manual_seed(4))
    (layer(x) * pull).sum().backward()
    scale, low = (part.detach().clone().requires_grad_(True) for part in (layer.weight_scale, layer.weight_low))
    assert isinstance(layer, quanto.QuantizedLinear) and layer.in_use is not None
    codes = (
        (layer.in_use.detach().unflatten(1, (5, 32)) - low.detach()[:, :, None]) / scale.detach()[:, :, None]
    ).round()
    values = (codes * scale[:, :, None] + low[:, :, None]).flatten(1)
    (F.linear(x, values, layer.bias.detach()) * pull).sum().backward()
    torch.testing.assert_close(layer.weight_scale.grad, scale.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight_low.grad, low.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, pull.T @ x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", FEW)
def test_they_are_frozen_written_and_read_back(weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = moved(weights, dtype), tokens(dtype=dtype)
    before = model(x)
    quanto.freeze(model)
    frozen = model(x)
    assert off(frozen, before) < (1e-5 if dtype == torch.float32 else 0.02)
    state = model.state_dict()
    assert {name for name in state if name.startswith("up.weight")} == {
        "up.weight._data._data",
        "up.weight._scale",
        "up.weight._shift",
    }
    quanto.save_quantized(model, tmp_path)
    again = quanto.load_quantized(net(dtype), tmp_path)
    assert off(again(x), frozen) < 1e-6
    thawed = moved(weights, dtype)
    thawed.load_state_dict(state)
    assert off(thawed(x), frozen) < 1e-6


@torch.no_grad()
def test_unfrozen_state_dicts_hold_them() -> None:
    model, other = moved("qint4"), net()
    quanto.quantize(other, weights="qint4")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens()), model(tokens()))


def test_eight_bits_have_none() -> None:
    model = net()
    quanto.quantize(model, weights="qint8")
    with pytest.raises(ConfigError, match="4 or 2 bits"):
        quanto.learn_ranges(model)
    with pytest.raises(ConfigError, match="4 or 2 bits"):
        quanto.solve(model, net(), lambda module: module(tokens()))


class Tower(nn.Module):
    """Two linears of one input, whose difference a third one gets; inputs of few directions and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.last = nn.Linear(96, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.first(x) - self.second(x)))
        return y


def inputs(seed: int) -> Tensor:
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 64)[:, None]
    return torch.randn(512, 64, generator=torch.Generator().manual_seed(seed)) @ mix + mix[5]


@torch.no_grad()
@pytest.mark.parametrize(("weights", "share"), [("qint4", 0.5), ("qint2", 0.7)])
def test_solved_codes_are_better_than_the_nearest(weights: str, share: float) -> None:
    torch.manual_seed(0)
    original = Tower()
    student = copy.deepcopy(original)
    quanto.quantize(student, weights=weights)
    wanted = original(inputs(2))
    rounded = off(student(inputs(2)), wanted)
    quanto.solve(student, original, lambda module: module(inputs(1)))
    solved = off(student(inputs(2)), wanted)
    assert solved < share * rounded
    quanto.freeze(student)
    assert off(student(inputs(2)), wanted) == pytest.approx(solved, rel=1e-3)


def test_solving_needs_the_same_inputs_for_both() -> None:
    original = Tower()
    student = copy.deepcopy(original)
    quanto.quantize(student, weights="qint4")
    with pytest.raises(ConfigError, match="other inputs"):
        quanto.solve(student, original, lambda module: module(inputs(1)[: 100 if module is student else 200]))
    assert all(layer.rounds for layer in student.children() if isinstance(layer, quanto.QuantizedLinear))
