"""Quantized text and image encoders: from a quantized checkpoint, and quantized while a float one loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightx2v.encoders import clip_vision, umt5
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.linear import ForceFP32Linear, QuantLinear
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.mm.weight import MM_WEIGHT_REGISTER
from lightx2v.platform import DeviceInfo, select_device
from lightx2v.quant.numerics import quantize_weight
from tests.models import tiny_encoders as tiny

CPU = torch.device("cpu")
PICTURE = Image.effect_mandelbrot((40, 30), (-1, -1, 1, 1), 20).convert("RGB")


@pytest.fixture(scope="module")
def device() -> DeviceInfo:
    return select_device("cpu")


def encode_text(files: tuple, **options: Any) -> tuple[nn.Module, Tensor]:
    encoder = umt5.load_text_encoder(*files, device=CPU, dtype=torch.float32, **options)
    return encoder.module, encoder.encode(["a red circle moves left"], text_len=12)[0]


def encode_picture(files: tuple, **options: Any) -> tuple[nn.Module, Tensor]:
    encoder = clip_vision.load_clip(*files, device=CPU, dtype=torch.float32, num_heads=2, **options)
    return encoder.module, encoder.encode([PICTURE])


def write(kind: str, folder: Path) -> tuple[tuple, Callable[..., tuple[nn.Module, Tensor]], Callable[..., dict]]:
    if kind == "t5":
        # Small weights: attention scores of hundreds would make one rounding decide which token is attended to.
        return tiny.write_t5(tiny.tiny_t5(scale=0.1), folder, "original"), encode_text, umt5.linear_shapes
    # Of 128 channels, so that blocks of 128 do not straddle q, k and v.
    return tiny.write_clip(tiny.tiny_clip(width=128), folder, "original"), encode_picture, clip_vision.linear_shapes


def plans(shapes: dict[str, tuple[int, int]], mm_type: str, device: DeviceInfo) -> dict[str, LayerPlan]:
    scheme = parse(mm_type)
    return {
        name: plan_layer(name, mm_type, scheme, n, k, device=device, fallback=False) for name, (n, k) in shapes.items()
    }


def quantize_file(path: Path, layers: dict[str, tuple[int, int]], mm_type: str) -> None:
    """As LightX2V's converter writes it: codes under the weight's name, scales beside it."""
    state, spec = torch.load(path), parse(mm_type).weight
    assert spec is not None
    for name in layers:
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = quantize_weight(state[f"{name}.weight"], spec)
    torch.save(state, path)


@pytest.mark.parametrize("mm_type", ["int8-reference", "fp8-reference", "fp8-b128-reference"])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_quantized_file_equals_quantizing_while_loading(
    kind: str, mm_type: str, device: DeviceInfo, tmp_path: Path
) -> None:
    files, encode, linear_shapes = write(kind, tmp_path)
    layers = linear_shapes(Checkpoint.open(files[0]))
    chosen = plans(layers, mm_type, device)
    _, exact = encode(files)
    module, on_arrival = encode(files, quant_plans=chosen, auto_quant=True)
    assert not [name for name, child in module.named_modules() if type(child) is nn.Linear]
    assert sum(isinstance(child, QuantLinear) for child in module.modules()) == {"t5": 14, "clip": 12}[kind]
    quantize_file(files[0], layers, mm_type)
    assert linear_shapes(Checkpoint.open(files[0])) == layers
    _, from_file = encode(files, quant_plans=chosen)
    assert torch.equal(from_file, on_arrival)
    error = (on_arrival - exact).norm() / exact.norm()
    assert 0 < error < (0.05 if "int8" in mm_type else 0.2)  # 7 bits and 3 bits of mantissa


def test_single_layers_can_be_planned(device: DeviceInfo, tmp_path: Path) -> None:
    files, encode, linear_shapes = write("t5", tmp_path)
    layers = linear_shapes(Checkpoint.open(files[0]))
    chosen = plans(layers, "Default", device) | plans({"blocks.1.ffn.fc2": (32, 40)}, "Default-Force-FP32", device)
    _, expected = encode(files)
    module, states = encode(files, quant_plans=chosen)
    assert torch.equal(states, expected)
    assert [n for n, m in module.named_modules() if isinstance(m, ForceFP32Linear)] == [
        "block.1.layer.1.DenseReluDense.wo"
    ]


class PlainMM:
    """A user's own mm_type: not quantized at all."""

    def __init__(self, weight_name: str, bias_name: str | None = None) -> None:
        self.weight_name, self.bias_name = weight_name, bias_name

    def set_config(self, mm_config: Mapping[str, Any]) -> None:
        pass

    def load(self, weight_dict: Mapping[str, Tensor]) -> None:
        self.weight = weight_dict[self.weight_name]
        self.bias = weight_dict[self.bias_name] if self.bias_name else None

    def apply(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_an_mm_type_of_the_user_computes_every_layer(kind: str, device: DeviceInfo, tmp_path: Path) -> None:
    MM_WEIGHT_REGISTER(f"plain-{kind}")(PlainMM)
    files, encode, linear_shapes = write(kind, tmp_path)
    _, expected = encode(files)
    module, states = encode(files, quant_plans=plans(linear_shapes(Checkpoint.open(files[0])), f"plain-{kind}", device))
    assert not [name for name, child in module.named_modules() if type(child) is nn.Linear]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_a_quantized_file_without_a_scheme_is_refused(device: DeviceInfo, tmp_path: Path) -> None:
    files, encode, linear_shapes = write("clip", tmp_path)
    layers = linear_shapes(Checkpoint.open(files[0]))
    quantize_file(files[0], layers, "fp8-reference")
    for chosen in (None, plans(layers, "Default", device)):
        with pytest.raises(CheckpointError, match="name its quantization scheme"):
            encode(files, quant_plans=chosen)


def test_blocks_that_straddle_q_k_and_v_are_refused(device: DeviceInfo, tmp_path: Path) -> None:
    files = tiny.write_clip(tiny.tiny_clip(width=160), tmp_path, "original")
    layers = clip_vision.linear_shapes(Checkpoint.open(files[0]))
    quantize_file(files[0], layers, "fp8-b128-reference")
    with pytest.raises(CheckpointError, match=r"to_qkv\.weight_scale: blocks of 128 rows straddle"):
        encode_picture(files, quant_plans=plans(layers, "fp8-b128-reference", device))
