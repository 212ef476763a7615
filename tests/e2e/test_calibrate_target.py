"""`lightx2v calibrate --target`: what is measured, and what is written, has the weights that the recipe makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v.calibrate.cli import main
from lightx2v.calibrate.clips import Clips, Measured
from lightx2v.calibrate.weights import calibrate
from lightx2v.config.load import load_config
from tests.e2e import flux_dirs

PROMPT = "a red circle on a white background moves right"
SMALL: dict[str, Any] = {"sampling.steps": 3, "calibration.forwards": 4, "calibration.rows": 64}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def target(folder: Path, goal: str, settings: dict[str, Any], prompt: str = PROMPT) -> dict[str, Any]:
    """What `target.json` says."""
    given = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    assert main(["--output", str(folder), "--target", goal, "--prompt", prompt, "--json", *given]) == 0
    told: dict[str, Any] = json.loads((folder / "target.json").read_text())
    return told


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], Measured]]:
    """Every checkpoint that clips are made of, and what they came to."""
    seen: list[tuple[dict[str, Tensor], Measured]] = []
    measure = Clips.measure

    def record(self: Clips, checkpoint: Path) -> Measured:
        seen.append((tensors_of(checkpoint), measure(self, checkpoint)))
        return seen[-1][1]

    monkeypatch.setattr(Clips, "measure", record)
    return seen


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def test_the_weights_that_were_measured_are_written(
    tmp_path: Path, trials: list[tuple[dict[str, Tensor], Measured]]
) -> None:
    """And they are those that `calibrate` makes with the same recipe and one mm_type, which rounding does not give."""
    recipe = {**SMALL, "calibration.solver": "gptq", "calibration.checks": 2}
    candidates = ["int8", "int4-g64-asym", "int3-g64-asym"]
    told = target(tmp_path / "mixed", "psnr=42", {**recipe, "calibration.candidates": candidates})
    written = tensors_of(tmp_path / "mixed")
    measured = [one for tensors, one in trials if same(tensors, written)]
    assert measured and told["measured_psnr"] == measured[-1].mean >= 42 + told["standard_error"]
    assert told["tries"] == len(trials) > 1
    assert len(told["layers"]) > 1 and sum(told["layers"].values()) == 40

    uniform: dict[str, dict[str, Tensor]] = {}
    for solver, mm_type in (("gptq", "int4-g64-asym"), ("gptq", "int3-g64-asym"), ("nearest", "int4-g64-asym")):
        one = {**recipe, "calibration.solver": solver, "calibration.sensitive": "none", "mm_config.mm_type": mm_type}
        with torch.inference_mode():
            calibrate(load_config(None, one), [PROMPT], tmp_path / f"{solver}-{mm_type}")
        uniform[f"{solver}-{mm_type}"] = tensors_of(tmp_path / f"{solver}-{mm_type}")
    report = json.loads((tmp_path / "mixed" / "calibration.json").read_text())["layers"]
    seen: dict[str, int] = {}
    for layer, one in report.items():
        bits = one["mm_type"].split("-")[1].removeprefix("int")
        if bits == "8":
            continue
        wanted = uniform[f"gptq-int{bits}-g64-asym"]
        leaves = [name for name in written if name.startswith(f"{layer}.")]
        assert all(written[name].equal(wanted[name]) for name in leaves), layer
        assert bits != "4" or not written[f"{layer}.weight"].equal(uniform["nearest-int4-g64-asym"][f"{layer}.weight"])
        seen[bits] = seen.get(bits, 0) + 1
    assert seen
    assert not list((tmp_path / "mixed").glob(".incomplete*"))


def test_multipliers_rotations_and_branches_are_measured_and_counted(
    tmp_path: Path, trials: list[tuple[dict[str, Tensor], Measured]]
) -> None:
    """A random model of the other family, whose norms could take multipliers: each layer keeps its own."""
    folder = flux_dirs.write_model(tmp_path / "flux", "dev", "original")
    run = {"model_cls": "flux", "task": "t2i", "model_path": str(folder), "dtype": "float32", "sampling.steps": 3}
    size = {"video.height": 64, "video.width": 64, "calibration.forwards": 4, "calibration.checks": 2}
    around = {"smooth": "smoothquant", "rotation": "auto", "rank": 2, "iterations": 2, "solver": "gptq"}
    recipe = {f"calibration.{key}": value for key, value in around.items()}
    candidates = {"calibration.candidates": ["int8-static", "nvfp4"]}
    told = target(tmp_path / "out", "psnr=28", {**run, **size, **recipe, **candidates}, "a fox")
    written, source = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert any(same(tensors, written) for tensors, _ in trials)
    layers = json.loads((tmp_path / "out" / "calibration.json").read_text())["layers"].keys()
    assert {name.rpartition(".")[0] for name in written if name.endswith(".lowrank_up")} == layers
    assert {name.rpartition(".")[0] for name in written if name.endswith(".input_rotation")} == layers
    multipliers = sum(4 * t.numel() for name, t in written.items() if name.endswith(".input_multiplier"))
    assert multipliers and all(tensor.equal(source[name]) for name, tensor in written.items() if "norm" in name)
    branches = sum(2 * t.numel() for name, t in written.items() if ".lowrank_" in name)
    codes = sum(t.nbytes for name, t in written.items() if name.rpartition(".")[0] in layers and ".weight" in name)
    rotations = 4 * len(layers)
    assert told["weight_bytes"] == pytest.approx(branches + multipliers + rotations + codes, abs=1)


def test_loras_are_in_what_is_measured_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    factors = {"lora_down": torch.randn(4, 256) / 16, "lora_up": torch.randn(256, 4) / 4}
    path = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.blocks.2.self_attn.o.{name}.weight": t for name, t in factors.items()}, path)
    settings = {**SMALL, "lora": [{"path": str(path), "strength": 1.0}], "calibration.checks": 1}
    told = target(tmp_path / "out", "memory=1", {**settings, "calibration.candidates": ["Default", "int8"]})
    assert told["layers"] == {"Default": 40} and told["measured_psnr"] == 100
