"""The converter's four-, six- and eight-bit formats with scales of blocks and of whole weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lightx2v.convert.options import LINEAR_TYPES
from lightx2v.convert.slabs import SLAB_ELEMENTS
from lightx2v.mm.scheme import parse
from lightx2v.quant.formats import dequantize_leaves, quantize_leaves, read_leaves, written_leaves
from lightx2v.quant.layouts import Stored, find_layout
from lightx2v.quant.spec import FP8_TENSOR
from tests.unit.convert_data import LAYERS, read, run, wan, write_wan

NEW = ("fp8-pertensor", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "int4-g128")
LINEARS = [f"blocks.{index}.{layer}" for index in range(2) for layer in LAYERS]
#: Of the dtypes that LightX2V's converter writes: weight, scale.
DTYPES = {
    "fp8-pertensor": (torch.float8_e4m3fn, torch.float32),
    "mxfp8": (torch.uint8, torch.float8_e8m0fnu),
    "mxfp6": (torch.uint8, torch.float8_e8m0fnu),
    "mxfp4": (torch.uint8, torch.float8_e8m0fnu),
    "nvfp4": (torch.uint8, torch.float8_e4m3fn),
    "int4-g128": (torch.uint8, torch.float32),
}


@pytest.mark.parametrize("scheme", NEW)
@pytest.mark.parametrize("slab", [1, 1 << 30], ids=["slabs of 128 rows", "one slab"])
def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, slab: int) -> None:
    """Slabs, some with the largest value of the weight and some without, make what the whole weight makes."""
    monkeypatch.setitem(SLAB_ELEMENTS, "cpu", slab)
    tensors, spec = wan(dim=200, ffn=300), LINEAR_TYPES[scheme]
    tensors["blocks.1.ffn.0.weight"][290, 7] = 40.0
    source = write_wan(tmp_path / "model", tensors)
    assert run(source, tmp_path / "out", "--quantized", "--linear_type", scheme, "-b", "--verify") == 0
    result = read(tmp_path / "out")
    for layer in LINEARS:
        source_weight = tensors[f"{layer}.weight"]
        wanted = written_leaves(quantize_leaves(source_weight, spec), spec)
        for leaf, tensor in wanted.items():
            got = result.pop(f"{layer}.{leaf}")
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), leaf
            assert torch.equal(got.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), (layer, leaf)
        assert (wanted["weight"].dtype, wanted["weight_scale"].dtype) == DTYPES[scheme]
        n, k = source_weight.shape
        told = {leaf: Stored(tensor.dtype, tuple(tensor.shape)) for leaf, tensor in wanted.items()}
        assert find_layout(spec, n, k, told) is not None
        back = dequantize_leaves(read_leaves(wanted, spec, n, k, layer), spec)[:, :k]
        assert (back - source_weight.float()).norm() <= 0.13 * source_weight.float().norm()
    assert result.keys() == tensors.keys() - {f"{layer}.weight" for layer in LINEARS}
    with safe_open(tmp_path / "out" / "block_0.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["quantization"])["layers"]
    name = {"mxfp6": "mxfp6-mxfp8"}.get(scheme, scheme)
    assert set(layers.values()) == {str(parse(name).name).partition("-A-")[0].removesuffix("-Auto")}


@pytest.mark.parametrize("scheme", NEW)
def test_verify_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str) -> None:
    source = write_wan(tmp_path / "model", wan(dim=128, ffn=256))
    out, flags = tmp_path / "out", ("--quantized", "--linear_type", scheme, "--verify", "--json", "-b")
    assert run(source, out, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    worst = report["worst"][0]
    assert report["verified"] is True and worst["bound"] / 20 < worst["error"] < worst["bound"]
    file = out / "block_1.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-6000:-2000] = bytes(4000)
    file.write_bytes(damaged)
    assert run(source, out, *flags) == 1
    assert "blocks.1." in capsys.readouterr().err


def test_comfyui(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = wan()
    source = write_wan(tmp_path / "model", tensors)
    flags = ("--quantized", "--linear_type", "fp8", "--comfyui_mode", "--verify")
    assert run(source, tmp_path / "out", *flags, "--single_file") == 0
    result = read(tmp_path / "out")
    mark = result.pop("scaled_fp8")
    assert (mark.dtype, mark.shape) == (torch.float8_e4m3fn, (2,)) and not mark.float().any()
    for layer in LINEARS:
        made = quantize_leaves(tensors[f"{layer}.weight"], FP8_TENSOR)
        scale = result[f"{layer}.scale_weight"]
        assert scale.shape == () and torch.equal(scale, made["weight_scale"].squeeze())
        assert torch.equal(result[f"{layer}.weight"].float(), made["weight"].float())
        assert f"{layer}.weight_scale" not in result
    assert run(source, tmp_path / "again", "--quantized", "--linear_type", "nvfp4", "--comfyui_mode") == 2
    assert "--comfyui_mode: writes no nvfp4" in capsys.readouterr().err
    assert run(source, tmp_path / "again", "--comfyui_mode") == 2
    assert "only with --quantized" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--linear_type", "nvfp4", "--bits", "4"), ""),
        (("--linear_type", "nvfp4", "--bits", "8"), ""),
        (("--linear_type", "mxfp6", "--bits", "6"), ""),
        (("--linear_type", "nvfp4", "--bits", "2"), "allowed: 4 (or 8, which LightX2V has for every type)"),
        (("--linear_type", "mxfp8", "--bits", "4"), "allowed: 8"),
        (("--linear_type", "nvfp4", "-t", "wan_t5"), "allowed: int8, fp8, fp8-b128"),
    ],
)
def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str) -> None:
    source = write_wan(tmp_path / "model", wan())
    assert run(source, tmp_path / "out", "--quantized", *flags) == (2 if says else 0)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4-g128"])
def test_a_quantized_file_can_be_split_anew(tmp_path: Path, scheme: str) -> None:
    source = write_wan(tmp_path / "model", wan())
    assert run(source, tmp_path / "one", "--quantized", "--linear_type", scheme, "--single_file") == 0
    single = tmp_path / "one" / "converted.safetensors"
    assert run(single, tmp_path / "split", "-b", "--non_linear_dtype", "torch.bfloat16") == 0
    before, after = read(tmp_path / "one"), read(tmp_path / "split")
    for layer in LINEARS:
        names = [name for name in before if name.startswith(f"{layer}.w")]
        assert len(names) == (3 if scheme == "nvfp4" else 2)
        for name in names:
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name].flatten().view(torch.uint8), before[name].flatten().view(torch.uint8))
