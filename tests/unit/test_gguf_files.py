"""Reading .gguf files: headers, values, raw blocks, and what is wrong with a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

from lightx2v.convert.cli import main as convert
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io import gguf as reading
from lightx2v.io.weights import Checkpoint
from lightx2v.platform import Probe


def write(path: Path, tensors: dict[str, tuple[Tensor, str]], shapes: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A file as city96's tools write it: name -> (values, kind of blocks)."""
    writer = GGUFWriter(str(path), "wan")
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    for name, (tensor, kind) in tensors.items():
        number = GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(tensor.float().numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "blocks.0.ffn.0.weight": (torch.randn(48, 64), "Q4_0"),
        "blocks.0.ffn.0.bias": (torch.randn(48), "F32"),
        "head.head.weight": (torch.randn(16, 64), "BF16"),
        "norm.weight": (torch.randn(64), "F16"),
        "odd.weight": (torch.randn(4, 64), "Q8_0"),
        "patch_embedding.weight": (torch.randn(2, 3, 1, 2, 32), "F16"),
    }
    return write(tmp_path / "wan-Q4_0.gguf", tensors, {"odd.weight": (2, 2, 64)})


def test_the_header_tells_shapes_and_kinds(file: Path) -> None:
    checkpoint = Checkpoint.open(file)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in checkpoint.tensors.items()} == {
        "blocks.0.ffn.0.weight": ("Q4_0", (48, 64), 48 * 36),
        "blocks.0.ffn.0.bias": ("F32", (48,), 192),
        "head.head.weight": ("BF16", (16, 64), 2048),
        "norm.weight": ("F16", (64,), 128),
        "odd.weight": ("Q8_0", (2, 2, 64), 4 * 68),
        "patch_embedding.weight": ("F16", (2, 3, 1, 2, 32), 768),
    }
    assert checkpoint.metadata["general.architecture"] == "wan"


def test_values_come_as_floats_and_named_ones_as_blocks(file: Path) -> None:
    name = "blocks.0.ffn.0.weight"
    checkpoint = Checkpoint.open(file)
    values = dict(checkpoint.stream())
    assert list(values) == list(checkpoint.tensors)
    dtypes = {key: tensor.dtype for key, tensor in values.items()}
    assert dtypes[name] == dtypes["odd.weight"] == torch.float32
    assert (dtypes["head.head.weight"], dtypes["norm.weight"]) == (torch.bfloat16, torch.float16)
    assert values["odd.weight"].shape == (2, 2, 64) and values["patch_embedding.weight"].shape == (2, 3, 1, 2, 32)
    raw = dict(checkpoint.stream([name, "norm.weight"], raw={name}))
    assert list(raw) == [name, f"{name}_type", "norm.weight"]
    assert raw[name].shape == (48, 36) and raw[name].dtype == torch.uint8
    assert (raw[f"{name}_type"].item(), raw[f"{name}_type"].dtype) == (2, torch.int32)
    wanted = quants.dequantize(raw[name].numpy(), GGMLQuantizationType.Q4_0)
    assert np.array_equal(values[name].numpy(), wanted)
    assert torch.equal(checkpoint.load(name), values[name])


def test_a_prefix_of_comfyui_is_taken_off(tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {"model.diffusion_model.a.weight": (torch.ones(2, 32), "Q8_0")})
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.tensors) == ["a.weight"] and checkpoint.load("a.weight").shape == (2, 32)


def test_what_is_wrong_with_a_file(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Checkpoint.open(tmp_path / "absent.gguf")
    for name, content in (("empty", b""), ("other", b"PK\x03\x04" * 10), ("short", file.read_bytes()[:40])):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is no whole GGUF file"):
            Checkpoint.open(tmp_path / f"{name}.gguf")
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="is no whole GGUF file"):
        Checkpoint.open(file)


def test_kinds_of_blocks_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    writer = GGUFWriter(str(path), "wan")
    writer.add_tensor("a.weight", np.zeros((2, 136), np.uint8), raw_dtype=GGMLQuantizationType.IQ4_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Checkpoint.open(path)
    assert checkpoint.tensors["a.weight"].shape == (2, 256)
    with pytest.raises(CheckpointError, match=r"blocks of IQ4_XS\n  allowed: F32, F16, BF16, Q4_0"):
        checkpoint.load("a.weight")


def test_without_the_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "probe", lambda module: Probe(module, None, "not installed"))
    with pytest.raises(ConfigError, match="pip install gguf"):
        Checkpoint.open(file)


def test_the_converter_does_not_take_them(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(["-s", str(file), "-o", str(tmp_path / "out")]) == 2
    assert "has the dtype Q4_0" in capsys.readouterr().err
    plain = write(tmp_path / "plain.gguf", {"patch_embedding.weight": (torch.ones(2, 4), "F32")})
    assert convert(["-s", str(plain), "-o", str(tmp_path / "out")]) == 2
    assert "a .gguf file is not converted" in capsys.readouterr().err
