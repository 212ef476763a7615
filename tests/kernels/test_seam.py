"""The kernels behind `lightx2v.elementwise` and `mm.together`, as an NVIDIA GPU would have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v import elementwise
from lightx2v.kernels import ops, trial
from lightx2v.mm.linear import QuantLinear, TokenCodes
from lightx2v.mm.scheme import parse
from lightx2v.mm.together import feed_forward


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device has the kernels in Triton."""
    monkeypatch.setattr(elementwise, "kernels_for", lambda *_: ops)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_trial_finds_nothing_wrong_and_sees_what_is(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.trial(device) is None
    real = ops.rms_rope
    monkeypatch.setattr(ops, "rms_rope", lambda x, w, c, s, *more: real(x, w, s, c, *more))
    assert "rms_rope gives wrong results" in str(trial.trial(device))
    monkeypatch.setattr(ops, "layer_norm", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in str(trial.trial(device))
    assert not trial.usable(torch.device("cpu"))


@pytest.mark.usefixtures("on_gpu")
def test_every_function_of_the_seam_gives_what_the_definition_gives(device: torch.device) -> None:
    x, y, gate = normal(2, 3, 24).to(device), normal(2, 3, 24, seed=1).to(device), normal(2, 1, 24, seed=2).to(device)
    bias, angle = normal(24, seed=3).to(device), normal(3, 1, 4, seed=4).to(device)
    rope = (angle.cos(), angle.sin())
    pairs = [
        (elementwise.layer_norm(x, bias, bias, 1e-6, torch.float32), F.layer_norm(x, (24,), bias, bias, 1e-6)),
        (
            elementwise.modulated_norm(x, gate, gate, 1e-6, torch.float32),
            F.layer_norm(x, (24,), eps=1e-6) * (1 + gate) + gate,
        ),
        (elementwise.norm_rope(x, None, 1e-6, 3, rope), elementwise.rotate(x.unflatten(-1, (3, -1)), rope)),
        (elementwise.add_gated(x, y, gate), x + y * gate),
        (elementwise.add_gated(x, y), x + y),
        (elementwise.gelu_tanh(x), F.gelu(x, approximate="tanh")),
    ]
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", ["int8-triton", "fp8-triton", "int8-reference"])
def test_gelu_and_quantization_of_a_feed_forward_are_one_pass(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = (layer.eval() for layer in (torch.nn.Linear(32, 80, device=device), linear(name, 48, 80, device)))
    x = normal(2, 5, 32, seed=6).to(device)
    apart = down(ops.gelu_tanh(up(x)))
    passes: list[str] = []
    real = ops.gelu_codes
    monkeypatch.setattr(ops, "gelu_codes", lambda y, by, kind: passes.append(kind) or real(y, by, kind))  # type: ignore[func-returns-value]
    monkeypatch.setattr(ops, "quantize_tokens", lambda *_: pytest.fail("quantized again"))
    with torch.no_grad():
        together = feed_forward(x, up, down)
    assert passes == [name.partition("-")[0]] and torch.equal(together, apart)


def test_codes_are_made_elsewhere_only_where_they_are_the_layers_own() -> None:
    device = torch.device("cpu")
    assert linear("int8-reference", 16, 32, device).token_codes == TokenCodes("int8", None)
    for name in ("fp8-b128-reference", "fp8-pertensor-dynamic-reference", "int8-weight-only"):
        assert linear(name, 16, 32, device).token_codes is None
    other = parse("W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Reference-ActVllm")  # rounds otherwise
    assert QuantLinear(32, 16, False, other, "reference", torch.float32).token_codes is None


def linear(name: str, n: int, k: int, device: torch.device) -> QuantLinear:
    scheme = parse(name)
    library = "dequantize" if scheme.activation is None else scheme.library
    layer = QuantLinear(k, n, True, scheme, library, torch.float32, weight_auto_quant=True)
    layer.load_tensor("weight", normal(n, k, seed=7).to(device))
    layer.load_tensor("bias", normal(n, seed=8).to(device))
    layer.finish()
    return layer
