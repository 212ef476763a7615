"""Quanto's files with quantized inputs, and bias-less layers of which only the model tells how long their rows are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.integrations.quanto import Calibration, freeze, quantize, save_quantized
from lightx2v.io.declared import declared_layers
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from tests.data.interop.tiny import wan
from tests.interop import stored

LAYERS = ["blocks.0.attn?.to_*", "blocks.0.ffn.*"]


def example() -> dict[str, Tensor]:
    return stored.example(stored.DATA / "quanto" / "int8")


@torch.no_grad()
def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    text = F.pad(given["text"], (0, 0, 0, 512 - given["text"].shape[1]))
    output: Tensor = model(given["latents"], given["timestep"], text).sample
    return output


def saved(folder: Path, weights: str, activations: str, streamline: bool = True) -> nn.Module:
    model, given = wan(width=32), example()
    quantize(model, weights=weights, activations=activations, include=LAYERS)
    with Calibration(streamline=streamline):
        run(model, given)
    freeze(model)
    save_quantized(model, folder)
    return model


@pytest.mark.parametrize(("kind", "mm_type"), [("qint8", "int8-static"), ("qfloat8", "fp8-pertensor")])
def test_inputs_are_rounded_by_the_stored_scales(kind: str, mm_type: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-wan"
    model, given = saved(folder, kind, kind), example()
    loaded = stored.load(stored.model_dir(folder, tmp_path / "model"))
    assert {layer.mm_type for layer in loaded.plan.layers} == {mm_type}
    assert stored.relative_error(stored.run(loaded.model, given), run(model, given)) < 1e-3


@pytest.mark.parametrize(
    ("weights", "activations", "streamline", "said"),
    [
        ("qint8", "qint8", False, "rounds its results too"),
        ("qint8", "qfloat8", True, "activations of type 'qfloat8_e4m3fn' and weights of another"),
        ("qint4", "qint8", True, "activations of type 'qint8' and weights of another"),
    ],
)
def test_what_no_layer_computes(weights: str, activations: str, streamline: bool, said: str, tmp_path: Path) -> None:
    saved(tmp_path, weights, activations, streamline)
    with pytest.raises(CheckpointError, match=said) as error:
        open_any(tmp_path, Wanted(lambda layer: True))
    assert "lightx2v.integrations.quanto" in str(error.value)


def test_a_scale_of_the_input_that_is_missing(tmp_path: Path) -> None:
    saved(tmp_path / "tiny", "qint8", "qint8")
    root = stored.model_dir(tmp_path / "tiny", tmp_path / "model")
    stored.edit(root, lambda tensors, metadata, config: tensors.pop("blocks.0.attn1.to_q.input_scale") and None)
    with pytest.raises(CheckpointError, match=r"attn1\.to_q\.input_scale' is missing"):
        open_any(root / "transformer", Wanted(lambda layer: True))


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(("n", "k"), [(24, 64), (8, 192), (16, 128), (4, 384), (6, 160)])
def test_the_model_says_how_long_rows_are(n: int, k: int, bits: int, tmp_path: Path) -> None:
    """Rows of 64 and groups of 64, of 128 and 128: the codes are of the same shape."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(k, n, bias=False))
    quantize(net, weights=f"qint{bits}")
    freeze(net)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "quanto_qmap.json").write_text(json.dumps({"0": {"weights": f"qint{bits}", "activations": "none"}}))
    checkpoint = open_any(tmp_path, Wanted(lambda layer: True, sizes={"0": (n, k)}))
    assert list(declared_layers(checkpoint.metadata)) == ["0"]
    floats = open_any(tmp_path, Wanted(lambda layer: False, sizes={"0": (n, k)})).load("0.weight")
    torch.testing.assert_close(floats, net[0].weight.detach(), rtol=0, atol=1e-6)
    wrong = Wanted(lambda layer: True, sizes={"0": (n + 1, k)})
    with pytest.raises(CheckpointError, match=f"for {n + 1} outputs"):
        open_any(tmp_path, wrong)
