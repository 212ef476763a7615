"""MM_WEIGHT_REGISTER: LightX2V's interface to one matrix multiplication, and mm_types from outside the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.mm import MM_WEIGHT_REGISTER, scheme
from lightx2v.mm.linear import swap_linears
from lightx2v.mm.scheme import known_names, parse
from lightx2v.mm.select import plan_layer
from lightx2v.platform import DeviceInfo
from lightx2v.quant.numerics import quantize_weight
from lightx2v.quant.spec import INT8_CHANNEL

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
WEIGHT = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
BIAS = torch.linspace(-1, 1, 48)
FLOATS = {"a.weight": WEIGHT, "a.bias": BIAS}


@pytest.mark.parametrize("name", known_names())
def test_every_known_name_resolves(name: str) -> None:
    assert name in MM_WEIGHT_REGISTER
    MM_WEIGHT_REGISTER[name]("a.weight", "a.bias").set_config({})


@pytest.mark.parametrize("name", ["Default", "Default-Force-FP32", "int8", "fp8", "fp8-b128", "int8-reference"])
def test_applies_to_two_and_more_dimensions(name: str) -> None:
    mm = MM_WEIGHT_REGISTER[name]("a.weight", "a.bias")
    mm.set_config({"mm_type": name, "weight_auto_quant": True})
    mm.load(FLOATS)
    x = torch.randn(2, 5, 64)
    wanted = F.linear(x, WEIGHT, BIAS)
    assert (mm.apply(x) - wanted).norm() <= 0.06 * wanted.norm()
    torch.testing.assert_close(mm.apply(x[0]), mm.apply(x)[0])


def test_reads_codes_and_their_scale_by_name() -> None:
    codes, scale = quantize_weight(WEIGHT, INT8_CHANNEL)
    mm = MM_WEIGHT_REGISTER["int8"]("a.weight")
    mm.load({"a.weight": codes, "a.weight_scale": scale})
    automatic = MM_WEIGHT_REGISTER["int8"]("a.weight")
    automatic.set_config({"weight_auto_quant": True})
    automatic.load(FLOATS)
    x = torch.randn(5, 64)
    assert torch.equal(mm.apply(x), automatic.apply(x))


def test_refuses_what_is_missing() -> None:
    mm = MM_WEIGHT_REGISTER["int8"]("a.weight", "a.bias")
    with pytest.raises(CheckpointError, match=r"'a\.bias' is missing"):
        mm.load({"a.weight": WEIGHT})
    with pytest.raises(CheckpointError, match="set weight_auto_quant"):
        mm.load(FLOATS)
    with pytest.raises(ConfigError, match="no adapter"):
        MM_WEIGHT_REGISTER["int4-g128-marlin"]("a.weight").load(FLOATS)
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        MM_WEIGHT_REGISTER["int9"]
    assert "int9" not in MM_WEIGHT_REGISTER


class Doubled:
    """A user's own matrix multiplication: twice the product."""

    def __init__(self, weight_name: str, bias_name: str | None = None) -> None:
        self.weight_name, self.bias_name = weight_name, bias_name
        self.config: Mapping[str, Any] = {}

    def set_config(self, mm_config: Mapping[str, Any]) -> None:
        self.config = mm_config

    def load(self, weight_dict: Mapping[str, Tensor]) -> None:
        self.weight = weight_dict[self.weight_name]

    def apply(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        return 2 * x @ self.weight.T


@pytest.fixture
def doubled() -> Iterator[str]:
    MM_WEIGHT_REGISTER("test-doubled")(Doubled)
    yield "test-doubled"
    del MM_WEIGHT_REGISTER._values["test-doubled"], scheme._own["test-doubled"]


def test_a_type_from_outside_works_in_a_model(doubled: str) -> None:
    plan = plan_layer("0", doubled, parse(doubled), 48, 64, device=CPU, fallback=False)
    assert plan.library == "custom"
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(64, 48))
    swap_linears(model, {"0": plan}, torch.bfloat16, auto_quant=True)
    model[0].load_tensor("weight", WEIGHT)
    model[0].load_tensor("bias", BIAS)
    model[0].finish()
    assert model[0].custom.config == {"mm_type": doubled, "weight_auto_quant": True}
    assert model[0].custom.bias_name == "0.bias"
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    out = model(x.float()).to(x.dtype)
    assert out.shape == (2, 5, 48) and torch.equal(model(x.float()), (2 * x.float() @ WEIGHT.T))


def test_a_name_is_given_once(doubled: str) -> None:
    for name in (doubled, "int8", "fp8-vllm"):
        with pytest.raises(ConfigError, match="is taken"):
            MM_WEIGHT_REGISTER(name)(Doubled)
    with pytest.raises(ConfigError, match="did you mean 'test-doubled'"):
        parse("test-doubler")
