"""LoRA on a quantized layer gives what LoRA on the unquantized one gives, within the error of the scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightx2v.config.load import load_config
from lightx2v.eval.compare import Comparison, compare
from lightx2v.eval.configs import plain
from lightx2v.eval.metrics import Clip, psnr
from lightx2v.eval.prompts import draw_prompts
from lightx2v.eval.results import Result
from lightx2v.io.weights import Checkpoint
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from lightx2v.plan.resolve import EMBEDDED
from tests.models.lora_data import Pair, random_pairs, write_lora

CASES = draw_prompts(2)
SMALL = {"video.height": 32, "video.width": 32, "video.frames": 5, "sampling.steps": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4 on every linear of the blocks of tiny-wan, each change two fifths of its weight's size."""
    held = dict(Checkpoint.open(EMBEDDED / "diffusion_pytorch_model.safetensors").stream())
    with torch.device("meta"):
        model = WanDiT(WanArch.from_config(json.loads((EMBEDDED / "config.json").read_text())))
    pairs = {}
    for name, pair in random_pairs(model).items():
        size = float(held[f"{name}.weight"].float().norm() / pair.product.norm())
        pairs[name] = Pair(pair.down, pair.up * 0.4 * size)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    write_lora(path, pairs)
    return path


def run(mm_type: str, lora: Path | None) -> tuple[Comparison, list[Clip]]:
    """The scheme against the unquantized model, both with the LoRA; and the clips of the latter."""
    given: dict[str, Any] = SMALL | {"mm_config.mm_type": mm_type, "mm_config.weight_auto_quant": True}
    if lora is not None:
        given["lora"] = [{"path": str(lora)}]
    config, clips = load_config(None, given), []

    def keep(result: Result, clip: Clip, reference: Clip | None) -> None:
        assert reference is not None
        clips.append(reference)

    return compare(config, plain(config), CASES, details=len(CASES), layer_steps=2, on_clip=keep), clips


def by_name(found: Comparison) -> dict[str, float]:
    assert found.layers is not None
    return {layer.name: layer.error for layer in found.layers.layers}


@pytest.mark.parametrize("mm_type", ["int8", "fp8", "nvfp4"])
def test_lora_on_quantized_layers(mm_type: str, lora: Path) -> None:
    (without, clips), (with_lora, changed) = run(mm_type, None), run(mm_type, lora)
    assert np.mean([psnr(clip, other) for clip, other in zip(clips, changed, strict=True)]) < 30, "it does something"
    errors, with_branch = by_name(without), by_name(with_lora)
    assert errors.keys() == with_branch.keys() and all(with_branch[name] <= 1.15 * errors[name] for name in errors)
    assert without.steps is not None and with_lora.steps is not None
    assert sum(with_lora.steps.mean) <= 1.25 * sum(without.steps.mean)
    lost = [found.report.distance_summary()["psnr_mean"] for found in (without, with_lora)]
    assert lost[0] is not None and lost[1] is not None and lost[1] >= lost[0] - 4
