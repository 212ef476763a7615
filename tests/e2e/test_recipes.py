"""The shipped configurations and scripts, on the embedded model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightx2v.config.load import load_config
from lightx2v.convert.cli import main as convert
from lightx2v.io.media import read_video
from lightx2v.plan import resolve
from lightx2v.platform import select_device

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "lightx2v" / "assets" / "tiny-wan"
OF_MODEL = {"quantization", "wan"}
"""Folders of configurations for the embedded model."""
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.json") if path.parent.name in OF_MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with `outputs/` as scripts/convert/quantize_wan_model.sh fills it."""
    base = tmp_path_factory.mktemp("run")

    def quantize(kind: str, source: str, output: str, scheme: str, *more: str) -> None:
        arguments = ["-t", kind, "-s", source, "-o", str(base / output), "--quantized", "--linear_type", scheme, *more]
        assert convert(arguments) == 0

    for scheme in ("int8", "fp8", "fp8-b128"):
        output = f"outputs/tiny-wan-{scheme}"
        quantize("wan_dit", str(MODEL / "diffusion_pytorch_model.safetensors"), f"{output}/dit-t2v", scheme)
        quantize("wan_dit", str(MODEL / "i2v"), f"{output}/dit-i2v", scheme)
        for name in ("t5", "clip"):
            quantize(f"wan_{name}", str(MODEL), output, scheme.removesuffix("-b128"), "--single_file", "-o_n", name)
    return base


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_resolves(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = load_config(str(path), {"device": "cpu"})
    plan = resolve(config, select_device("cpu"))
    quantized = {layer.mm_type for layer in plan.components["dit"].layers} - {"Default"}
    assert bool(quantized) == (path.parent.name == "quantization")
    assert plan.request.task == config.task


@pytest.mark.parametrize(
    "script",
    ["wan/run_wan_t2v.sh", "wan/run_wan_i2v.sh", "quantization/run_wan_quantized.sh int8 t2v"],
)
def test_script_runs_as_it_is(script: str, tmp_path: Path) -> None:
    name, *arguments = script.split()
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RESULT": "result.gif",
    }
    command = [str(ROOT / "scripts" / name), *arguments, "--device", "cpu", "--set", "sampling.steps=1"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert read_video(tmp_path / "result.gif").shape == (17, 64, 64, 3)
