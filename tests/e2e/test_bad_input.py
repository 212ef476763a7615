"""Whatever a user gets wrong ends with its exit code, an error that says what to do, and nothing half-written."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v import infer
from lightx2v.mm.scheme import parse
from lightx2v.quant.numerics import quantize_weight
from tests.e2e.model_dirs import write_model

SMALL = ["--set", "video.height=32", "--set", "video.width=32", "--set", "video.frames=5", "--set", "sampling.steps=1"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {task: write_model(root / task, task, "original") for task in ("t2v", "i2v")}


def run(capsys: Capture, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `python -m lightx2v.infer`."""
    try:
        code = infer.main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def generate(capsys: Capture, model: Path, out: Path, *arguments: str, task: str = "t2v") -> tuple[int, str]:
    """Run the tiny model at its smallest on the CPU."""
    return run(
        capsys,
        "--model_path",
        str(model),
        "--task",
        task,
        "--device",
        "cpu",
        "--prompt",
        "a red circle",
        "--save_result_path",
        str(out),
        *SMALL,
        *arguments,
    )


def assert_refused(result: tuple[int, str], code: int, *parts: str) -> None:
    assert result[0] == code, result[1]
    for part in parts:
        assert part in result[1]
    assert "Traceback" not in result[1]


def assert_nothing_written(out: Path) -> None:
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"sampling": {"stps": 3}}', ("sampling.stps", "did you mean 'sampling.steps'")),
        ('{"mm_config": {"mm_typ": "int8"}}', ("mm_config.mm_typ", "mm_type")),
        ('{"sampling": {"shift": "much"}}', ("sampling.shift", "much")),
        ('{"seed": 1,\n "prompt": }', (":2:", "JSON")),
        ('{"mm_config": {"mm_type": "int9"}}', ("int9", "did you mean")),
    ],
    ids=["misspelt", "misspelt nested", "wrong type", "not JSON", "unknown mm_type"],
)
def test_config_errors(
    capsys: Capture, tmp_path: Path, models: dict[str, Path], text: str, parts: tuple[str, ...]
) -> None:
    config, out = tmp_path / "c.json", tmp_path / "out" / "v.mp4"
    config.write_text(text)
    assert_refused(generate(capsys, models["t2v"], out, "--config_json", str(config)), 2, *parts)
    assert_nothing_written(out)


@pytest.mark.parametrize(
    ("setting", "nearest"), [("video.height=40", "32, 48"), ("video.width=30", "16, 32"), ("video.frames=7", "5, 9")]
)
def test_size_that_does_not_fit(
    capsys: Capture, tmp_path: Path, models: dict[str, Path], setting: str, nearest: str
) -> None:
    out = tmp_path / "out" / "v.mp4"
    assert_refused(generate(capsys, models["t2v"], out, "--set", setting), 2, setting.partition("=")[0], nearest)
    assert_nothing_written(out)


def test_model_path_missing_or_of_another_family(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "out" / "v.mp4"
    assert_refused(generate(capsys, tmp_path / "nowhere", out), 2, "nowhere")
    flux = tmp_path / "flux"
    flux.mkdir()
    (flux / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert_refused(generate(capsys, flux, out), 2, "FluxPipeline")
    assert_nothing_written(out)


def test_truncated_checkpoint(capsys: Capture, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "m", "t2v", "original"), tmp_path / "out" / "v.mp4"
    weights = model / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(generate(capsys, model, out), 2, weights.name, "truncated", "1,000 bytes")
    assert_nothing_written(out)


def test_t2v_weights_for_i2v(capsys: Capture, tmp_path: Path, models: dict[str, Path]) -> None:
    out = tmp_path / "out" / "v.mp4"
    assert_refused(generate(capsys, models["t2v"], out, "--image_path", "x.png", task="i2v"), 2, "i2v", "t2v")
    assert_nothing_written(out)


def quantized(model: Path, file: Path, mm_type: str, change: Callable[[dict[str, Tensor]], Any] | None = None) -> Path:
    """The DiT of `model` converted to `mm_type`, then spoilt by `change`."""
    spec = parse(mm_type).weight
    assert spec is not None
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "diffusion_pytorch_model.safetensors").items():
        if tensor.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            tensors[name], tensors[f"{name}_scale"] = quantize_weight(tensor, spec)
        else:
            tensors[name] = tensor
    if change is not None:
        change(tensors)
    save_file(tensors, file)
    return file


SCALE = "blocks.0.ffn.0.weight_scale"


@pytest.mark.parametrize(
    ("stored", "mm_type", "change", "parts"),
    [
        ("int8", "int8", lambda t: t.pop(SCALE), (SCALE, "missing")),
        ("int8", "int8", lambda t: t.update({SCALE: t[SCALE][:-1].clone()}), (SCALE, "shape")),
        ("int8", "fp8", None, ("I8", "F8_E4M3", "'fp8'")),
        ("fp8", "Default", None, ("F8_E4M3", "Default")),
        ("fp8", "fp8-b128", None, ("weight_scale", "shape")),
    ],
    ids=["missing scale", "scale shape", "int8 under fp8", "fp8 as original", "channel under block128"],
)
def test_checkpoint_that_does_not_fit_the_scheme(
    capsys: Capture,
    tmp_path: Path,
    models: dict[str, Path],
    stored: str,
    mm_type: str,
    change: Any,
    parts: tuple[str, ...],
) -> None:
    out = tmp_path / "out" / "v.mp4"
    file = quantized(models["t2v"], tmp_path / "dit.safetensors", stored, change)
    settings = ["--set", f"dit_quantized_ckpt={file}", "--set", f"mm_config.mm_type={mm_type}"]
    assert_refused(generate(capsys, models["t2v"], out, *settings), 2, *parts)
    assert_nothing_written(out)


def test_fp8_file_as_the_model_itself(capsys: Capture, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "m", "t2v", "original"), tmp_path / "out" / "v.mp4"
    quantized(model, model / "new.safetensors", "fp8")
    (model / "new.safetensors").replace(model / "diffusion_pytorch_model.safetensors")
    assert_refused(generate(capsys, model, out), 2, "F8_E4M3", "quantized checkpoint")
    assert_nothing_written(out)


def test_quantized_weights_in_their_usual_place_are_found(capsys: Capture, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "m", "t2v", "original"), tmp_path / "out" / "v.png"
    (model / "int8").mkdir()
    quantized(model, model / "int8" / "x.safetensors", "int8")
    code, err = generate(capsys, model, out, "--set", "mm_config.mm_type=int8")
    assert code == 0, err
    assert str(model / "int8") in err


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran.txt", "w"))


def test_pickle_with_code(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = write_model(tmp_path / "m", "t2v", "original"), tmp_path / "out" / "v.mp4"
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Payload()}, model / "Wan2.1_VAE.pth", pickle_module=pickle)
    assert_refused(generate(capsys, model, out), 2, "Wan2.1_VAE.pth", "code")
    assert not (tmp_path / "ran.txt").exists()
    assert_nothing_written(out)


def test_image_absent_or_unreadable(capsys: Capture, tmp_path: Path, models: dict[str, Path]) -> None:
    out, model = tmp_path / "out" / "v.mp4", models["i2v"]
    assert_refused(generate(capsys, model, out, task="i2v"), 2, "image_path")
    assert_refused(generate(capsys, model, out, "--image_path", str(tmp_path / "no.png"), task="i2v"), 2, "no.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    assert_refused(generate(capsys, model, out, "--image_path", str(broken), task="i2v"), 2, "broken.png")
    assert_nothing_written(out)


def test_not_enough_memory_is_said_before_loading(capsys: Capture, tmp_path: Path, models: dict[str, Path]) -> None:
    out = tmp_path / "out" / "v.mp4"
    result = generate(capsys, models["t2v"], out, "--set", "max_memory_gb=0.0001")
    assert_refused(result, 2, "memory", "needs about", "unload_modules")
    assert "load dit" not in result[1]
    assert_nothing_written(out)


def test_empty_prompt_is_a_warning(capsys: Capture, tmp_path: Path, models: dict[str, Path]) -> None:
    out = tmp_path / "new" / "folder" / "v.mp4"
    code, err = generate(capsys, models["t2v"], out, "--prompt", "")
    assert code == 0, err
    assert "prompt is empty" in err
    assert out.stat().st_size > 0, "the folder is made and the file is whole"


def test_disk_full(capsys: Capture, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "frames/"
    original = Image.Image.save

    def full(self: Image.Image, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert_refused(generate(capsys, models["t2v"], Path(f"{out}"), "--save_result_path", f"{out}/"), 1, "full")
    assert_nothing_written(out)


def test_interrupt_leaves_no_half_file(
    capsys: Capture, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "v.png"

    def interrupt(self: Image.Image, *arguments: Any, **options: Any) -> None:
        Path(arguments[0] if isinstance(arguments[0], str | Path) else arguments[0].name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    code, err = generate(capsys, models["t2v"], out)
    assert code == 130, err
    assert "interrupted" in err
    assert_nothing_written(out)


def test_missing_library_lists_the_others(capsys: Capture, tmp_path: Path, models: dict[str, Path]) -> None:
    config, out = tmp_path / "c.json", tmp_path / "out" / "v.mp4"
    mm = {"mm_type": "W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm", "weight_auto_quant": True}
    config.write_text(json.dumps({"mm_config": mm}))
    result = generate(capsys, models["t2v"], out, "--config_json", str(config))
    assert_refused(result, 2, "vllm", "not installed", "TorchNative")
    assert_nothing_written(out)
