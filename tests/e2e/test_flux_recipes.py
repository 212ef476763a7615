"""FLUX.1's configurations and scripts on tiny models, and requests that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightx2v.config.load import load_config
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io.media import read_metadata, read_video
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.plan import Plan, resolve
from lightx2v.platform import select_device
from tests.e2e.flux_dirs import write_model

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "flux").glob("*.json"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    layouts: dict[str, Any] = {"dev": "comfyui", "schnell": "original", "kontext": "diffusers"}
    return {variant: write_model(base / variant, variant, layout) for variant, layout in layouts.items()}


def plan(models: dict[str, Path], variant: str, path: Path | None = None, **overrides: Any) -> Plan:
    settings = {"model_cls": "flux", "model_path": str(models[variant]), "device": "cpu", **overrides}
    return resolve(load_config(None if path is None else str(path), settings), select_device("cpu"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_resolves(path: Path, models: dict[str, Path]) -> None:
    variant = next((name for name in models if name in path.stem), "dev")
    planned = plan(models, variant, path)
    quantized = {layer.mm_type for layer in planned.components["dit"].layers} - {"Default"}
    assert quantized == ({"fp8"} if path.stem == "flux_dev_fp8" else set())
    assert planned.request.steps == (4 if variant == "schnell" else 28)
    assert planned.request.guidance == (2.5 if variant == "kontext" else 3.5)
    assert (planned.request.height, planned.request.cfg) == (1024, False)


@pytest.mark.parametrize(
    ("script", "variant", "config"),
    [
        ("run_flux_t2i.sh", "schnell", "flux_schnell.json"),
        # With Kontext's own configuration it would encode a reference picture of a million pixels.
        ("run_flux_kontext.sh", "dev", "flux_dev_i2i.json"),
    ],
)
def test_script_runs(script: str, variant: str, config: str, models: dict[str, Path], tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MODEL_PATH": str(models[variant]),
        "CONFIG_JSON": str(ROOT / "configs" / "flux" / config),
        "RESULT": "result.png",
    }
    small = ("video.height=32", "video.width=48", "sampling.steps=2")
    flags = [part for setting in small for part in ("--set", setting)]
    command = [str(ROOT / "scripts" / "flux" / script), "--device", "cpu", *flags]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert read_video(tmp_path / "result.png").shape == (1, 32, 48, 3)
    assert read_metadata(tmp_path / "result.png")["seed"] == "42"


def test_image_to_image_depends_on_its_strength(models: dict[str, Path], tmp_path: Path) -> None:
    y, x = np.mgrid[0:32, 0:48]
    Image.fromarray(np.stack([5 * x, 4 * y, 255 - 2 * x], -1).astype(np.uint8)).save(tmp_path / "a.png")
    results = []
    for strength in (0.25, 0.5, 1.0):
        overrides = {
            "model_cls": "flux",
            "task": "i2i",
            "model_path": str(models["dev"]),
            "device": "cpu",
            "prompt": "red",
            "image_path": str(tmp_path / "a.png"),
            "video.height": 32,
            "video.width": 48,
            "sampling.steps": 4,
            "sampling.strength": strength,
        }
        results.append(LightX2VPipeline.from_config(load_config(None, overrides)).generate(quiet=True))
    assert len({result.tobytes() for result in results}) == 3


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        ("dev", {"task": "t2v"}, r"'t2v' is not a task of flux.*t2i, i2i"),
        ("dev", {"task": "t2i", "video.height": 40}, r"video\.height: 40 does not fit.*32, 48"),
        ("dev", {"task": "t2i", "text_len": 600}, "at most 512"),
        ("schnell", {"task": "t2i", "text_len": 300}, "at most 256"),
    ],
)
def test_what_does_not_fit_is_refused(
    variant: str, overrides: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        plan(models, variant, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task": "t2i", "video.frames": 5}, r"video\.frames"),
        ({"task": "i2i"}, "image_path.*give --image_path"),
        ({"task": "i2i", "image_path": ""}, "image_path.*give --image_path"),
    ],
)
def test_requests_that_lack_something_are_refused(
    overrides: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    config = load_config(None, {"model_cls": "flux", "model_path": str(models["dev"]), "device": "cpu", **overrides})
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        LightX2VPipeline.from_config(config).generate(quiet=True)


def test_a_model_of_another_family_is_refused(models: dict[str, Path]) -> None:
    wan = ROOT / "lightx2v" / "assets" / "tiny-wan"
    config = load_config(None, {"model_cls": "flux", "task": "t2i", "model_path": str(wan), "device": "cpu"})
    with pytest.raises(CheckpointError, match=r"img_in\.weight|any of these|lacks the DiT"):
        resolve(config, select_device("cpu"))
    config = load_config(None, {"task": "t2v", "model_path": str(models["kontext"]), "device": "cpu"})
    with pytest.raises(CheckpointError, match="not Wan"):
        resolve(config, select_device("cpu"))
