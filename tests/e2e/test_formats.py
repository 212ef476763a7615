"""The embedded model with its weights in every format: quantized as it loads, converted, from ComfyUI, from GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightx2v import LightX2VPipeline
from lightx2v.convert.cli import main as convert
from lightx2v.eval.detector import detect
from lightx2v.eval.metrics import psnr
from lightx2v.eval.prompts import parse_prompt
from lightx2v.plan.resolve import EMBEDDED
from tests.unit.test_gguf_files import write

DIT = EMBEDDED / "diffusion_pytorch_model.safetensors"
PROMPT = "a red circle on a white background moves right"
#: mm_type -> least PSNR in dB against the unquantized run. 4-bit weights change details, never what is seen.
TYPES = {
    "fp8-pertensor": 34,
    "mxfp8": 40,
    "mxfp6-mxfp8": 27,
    "mxfp4": 27,
    "nvfp4": 26,
    "nvfp4-reference": 26,
    "int4-g128": 28,
    "gguf-Q8_0": 44,
    "gguf-Q4_0": 27,
}
LINEAR_TYPES = {"mxfp6": "mxfp6-mxfp8"}
LINEARS = ("self_attn", "cross_attn", "ffn")


def shown(frames: np.ndarray) -> None:
    scene, found = parse_prompt(PROMPT), detect(frames)
    assert (found.color, found.shape) == (scene.color, scene.shape)


def run(mm_type: str, checkpoint: Path | None = None) -> tuple[np.ndarray, LightX2VPipeline]:
    pipe = LightX2VPipeline(device="cpu")
    path = {} if checkpoint is None else {"dit_quantized_ckpt": str(checkpoint)}
    pipe.enable_quantize(dit_quantized=True, quant_scheme=mm_type, **path)
    return pipe.generate(PROMPT, seed=1, quiet=True), pipe


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return LightX2VPipeline(device="cpu").create_generator().generate(PROMPT, seed=1, quiet=True)


@pytest.mark.parametrize("mm_type", TYPES)
def test_quantized_while_loading(mm_type: str, plain: np.ndarray) -> None:
    frames, pipe = run(mm_type)
    assert {layer.mm_type for layer in pipe.plan.components["dit"].layers} == {mm_type}
    shown(frames)
    assert psnr(frames, plain) >= TYPES[mm_type] and not np.array_equal(frames, plain)


@pytest.mark.parametrize("linear_type", ["fp8-pertensor", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "int4-g128"])
def test_converted_before(linear_type: str, tmp_path: Path) -> None:
    out = tmp_path / "dit"
    flags = ["--quantized", "--linear_type", linear_type, "--save_by_block", "--verify"]
    assert convert(["-s", str(DIT), "-o", str(out), "-t", "wan_dit", *flags]) == 0
    mm_type = LINEAR_TYPES.get(linear_type, linear_type)
    frames, pipe = run("auto", out)
    assert {layer.mm_type for layer in pipe.plan.components["dit"].layers} == {mm_type}
    assert np.array_equal(frames, run(mm_type)[0])


def test_from_comfyui(tmp_path: Path, plain: np.ndarray) -> None:
    flags = ["--quantized", "--linear_type", "fp8", "--comfyui_mode", "--single_file"]
    assert convert(["-s", str(DIT), "-o", str(tmp_path), "-t", "wan_dit", *flags]) == 0
    frames, pipe = run("auto", tmp_path / "converted.safetensors")
    assert {layer.mm_type for layer in pipe.plan.components["dit"].layers} == {"fp8-pertensor"}
    assert np.array_equal(frames, run("fp8-pertensor")[0]) and psnr(frames, plain) >= TYPES["fp8-pertensor"]


def test_marked_by_comfyui_in_the_metadata(tmp_path: Path) -> None:
    assert convert(["-s", str(DIT), "-o", str(tmp_path), "--quantized", "--linear_type", "mxfp8", "--single_file"]) == 0
    tensors = load_file(tmp_path / "converted.safetensors")
    layers = []
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        layer = name.removesuffix(".weight_scale")
        layers.append(layer)
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].view(torch.float8_e4m3fn)
        tensors[name] = tensors[name].view(torch.uint8)  # alone, this would be read as a plain scale
    said = ", ".join(f'"{layer}": {{"format": "mxfp8"}}' for layer in layers)
    file = tmp_path / "comfy.safetensors"
    save_file(tensors, file, {"_quantization_metadata": f'{{"layers": {{{said}}}}}'})
    assert np.array_equal(run("auto", file)[0], run("mxfp8")[0])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_from_gguf(kind: str, tmp_path: Path, plain: np.ndarray) -> None:
    """As city96 makes them: blocks for matrices, F16 where a matrix is small, F32 for all else."""
    tensors = {}
    for name, tensor in load_file(DIT).items():
        of_block = name.startswith("blocks.") and tensor.ndim == 2 and name.split(".")[2] in LINEARS
        large = of_block or (tensor.ndim == 2 and name.startswith("text_embedding"))
        small = name == "blocks.0.ffn.2.weight"
        tensors[name] = (tensor, "F16" if small else kind if large else "F32")
    file = write(tmp_path / f"tiny-{kind}.gguf", tensors)
    frames, pipe = run("auto", file)
    types = {layer.name: layer.mm_type for layer in pipe.plan.components["dit"].layers}
    assert types.pop("blocks.0.ffn.2") == "Default" and set(types.values()) == {f"gguf-{kind}"}
    shown(frames)
    assert psnr(frames, plain) >= TYPES[f"gguf-{kind}"] - 2
    named, _ = run(f"gguf-{kind}", file)
    assert psnr(named, frames) >= 40, "the float layer is dequantized at each call as well"
