"""Quanto's functions over whole models: which layers, calibration, maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightx2v.errors import ConfigError
from lightx2v.integrations import quanto
from tests.unit.quanto_nets import calibrated, net, off, tokens


def chosen(**patterns: Any) -> set[str]:
    model = net()
    quanto.quantize(model, weights="qint8", **patterns)
    return set(quanto.quantization_map(model))


def test_globs_choose_layers_by_their_full_names() -> None:
    assert chosen() == {"up", "down", "out", "conv"}
    assert chosen(include="*o*") == {"down", "out", "conv"}
    assert chosen(include=["up", "out"], exclude="o*") == {"up"}
    assert chosen(exclude=[]) == {"up", "down", "out", "conv"}


def test_nothing_to_quantize_is_an_error() -> None:
    for patterns in ({"include": []}, {"include": "Up"}, {"exclude": "*"}):
        with pytest.raises(ConfigError, match="no layer of Net was quantized"):
            chosen(**patterns)
    with pytest.raises(ConfigError, match="no layer"):
        quanto.quantize(net())


def test_types_go_by_quantos_and_diffusers_names() -> None:
    for name, kind in {"qfloat8": quanto.qfloat8_e4m3fn, "float8": quanto.qfloat8, "int2": quanto.qint2}.items():
        model = net()
        quanto.quantize(model, weights=name)
        assert quanto.quantization_map(model)["up"]["weights"] == kind.name
    with pytest.raises(ConfigError, match="did you mean 'qint4'"):
        quanto.quantize(net(), weights="qint44")
    with pytest.raises(ConfigError, match="activations are not quantized to qint4"):
        quanto.quantize(net(), weights="qint4", activations="qint4")


def test_quantizing_twice_changes_nothing_more() -> None:
    model = net()
    quanto.quantize(model, weights="qint4", include="up")
    quanto.quantize(model, weights="qint8")
    kinds = {name: each["weights"] for name, each in quanto.quantization_map(model).items()}
    assert kinds == {"up": "qint4", "down": "qint8", "out": "qint8", "conv": "qint8"}


@torch.no_grad()
def test_scales_are_running_means_of_the_largest_values() -> None:
    model = nn.Sequential(nn.Linear(160, 8))
    plain = model[0]
    quanto.quantize(model, weights="qint8", activations="qint8")
    batches = [tokens(seed=seed) * (seed + 1) for seed in range(4)]
    with quanto.Calibration(momentum=0.7):
        for batch in batches:
            model(batch)
    wanted = float(batches[0].abs().max()) / 127
    for batch in batches[1:]:
        wanted = 0.7 * wanted + 0.3 * float(batch.abs().max()) / 127
    assert float(model[0].input_scale) == pytest.approx(wanted, rel=1e-6)
    assert isinstance(plain, nn.Linear) and float(model[0].output_scale) > 0


@torch.no_grad()
def test_a_batch_of_zeros_says_nothing() -> None:
    model = nn.Sequential(nn.Linear(160, 8, bias=False))
    quanto.quantize(model, weights="qint8", activations="qint8")
    with quanto.Calibration():
        model(torch.zeros(1, 160))
        model(tokens())
        model(torch.zeros(1, 160))
    assert float(model[0].input_scale) == pytest.approx(float(tokens().abs().max()) / 127, rel=1e-6)


@torch.no_grad()
def test_streamlined_results_stay_as_they_are() -> None:
    for streamline in (True, False):
        model = net()
        quanto.quantize(model, weights="qint8", activations="qint8")
        calibrated(model, streamline)
        values = model.up(tokens()) / model.up.output_scale
        assert bool((values - values.round()).abs().max() < 1e-4) is not streamline
        told = quanto.quantization_map(model)["norm"]
        assert told["activations"] == "qint8" and (told.get("outputs") == "none") is streamline


@torch.no_grad()
def test_a_layer_adopts_the_scale_of_the_result_it_is_given() -> None:
    model = net()
    quanto.quantize(model, weights="qint8", activations="qint8")
    calibrated(model, streamline=False)
    assert torch.equal(model.out.input_scale, model.down.output_scale)
    assert not torch.equal(model.down.input_scale, model.norm.output_scale)  # a ReLU stands between


@torch.no_grad()
def test_whether_results_are_quantized_survives_a_reload() -> None:
    for streamline in (True, False):
        model = net()
        quanto.quantize(model, weights="qint8", activations="qint8")
        calibrated(model, streamline)
        quanto.freeze(model)
        other = net()
        quanto.requantize(other, model.state_dict(), quanto.quantization_map(model))
        assert torch.equal(other(tokens()), model(tokens()))


def test_freezing_without_calibration_names_the_layers() -> None:
    model = net()
    quanto.quantize(model, weights="qint8", activations="qint8")
    with pytest.raises(ConfigError, match=r"up, norm, down, out, conv: the activations of 5 layers"):
        quanto.freeze(model)
    assert isinstance(model.up, quanto.QuantizedLinear) and not model.up.frozen


@torch.no_grad()
def test_frozen_layers_can_be_calibrated_again() -> None:
    model = net()
    quanto.quantize(model, weights="qint8", activations="qint8", include=["up", "down", "out"])
    calibrated(model)
    before = float(model.up.input_scale)
    quanto.freeze(model)
    with quanto.Calibration(momentum=0.0):
        model(tokens() * 3)
    assert float(model.up.input_scale) > 2 * before
    plain = net()
    assert off(model(tokens() * 3), plain(tokens() * 3)) < 0.02


def test_momentum_has_bounds() -> None:
    with pytest.raises(ConfigError, match="momentum"):
        quanto.Calibration(momentum=1.0)
