"""int8 attention with calibrated scales, from a checkpoint of tiny-wan, with other features beside it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from lightx2v.calibrate.attention import observe_attention
from lightx2v.config.load import load_config
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.eval.metrics import psnr
from lightx2v.foreign.attention import plan_attention
from lightx2v.io.weights import Checkpoint, write_safetensors
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.plan import resolve
from lightx2v.plan.resolve import EMBEDDED
from lightx2v.platform import select_device
from lightx2v.runner import Runner

PROMPT = "a red circle on a black background moves left"
SETTINGS: dict[str, Any] = {"sampling.steps": 4, "video.frames": 5}
STATIC: dict[str, Any] = {"attention.type": "fa3_int8_static_ref"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded DiT with scales."""
    plan: Any = resolve(load_config(None, SETTINGS | {"prompt": PROMPT}), select_device("cpu"))
    runner = Runner(plan)
    with runner.components.use("dit", runner.timer) as dit, observe_attention(dit.model) as observer:
        runner.run(plan.request, quiet=True)
    checkpoint = Checkpoint.open(EMBEDDED / "diffusion_pytorch_model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in checkpoint.stream()}
    path = tmp_path_factory.mktemp("static") / "dit.safetensors"
    write_safetensors(path, tensors | observer.scales(), checkpoint.metadata)
    return path


def clip(**more: Any) -> np.ndarray:
    config = load_config(None, SETTINGS | more)
    return LightX2VPipeline.from_config(config).generate(PROMPT, seed=3, quiet=True)


@pytest.fixture(scope="module")
def static(file: Path) -> np.ndarray:
    return clip(dit_quantized_ckpt=str(file), **STATIC)


def test_it_is_close_to_the_plain_run(file: Path, static: np.ndarray) -> None:
    plain = clip()
    assert np.array_equal(clip(dit_quantized_ckpt=str(file)), plain)
    assert 70 > psnr(static, plain) > 35


@pytest.mark.parametrize(
    "more",
    [
        {"offload.granularity": "block"},
        {"offload.granularity": "phase", "offload.lazy_load": True},
        {"offload.granularity": "model"},
    ],
    ids=["block", "lazy phase", "model"],
)
def test_offloaded_it_gives_the_same(file: Path, static: np.ndarray, more: dict[str, Any]) -> None:
    got = clip(dit_quantized_ckpt=str(file), **STATIC, **more, **{"offload.enabled": True})
    assert np.array_equal(got, static)


def test_compiled_blocks_share_a_graph(file: Path, static: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    got = clip(dit_quantized_ckpt=str(file), compile=True, **STATIC)
    assert counter.frame_count == 1
    assert np.abs(got.astype(int) - static.astype(int)).max() <= 8 and psnr(got, static) > 45


def test_without_scales_it_is_refused_by_name(file: Path) -> None:
    for more in (STATIC, {"attention.rules": [{"type": "fa3_int8_static_ref", "part": "cross", "layers": "2"}]}):
        with pytest.raises(CheckpointError, match="calibrate first") as caught:
            resolve(load_config(None, SETTINGS | more), select_device("cpu"))
        assert ".attn_scales.q' is missing" in str(caught.value)
    assert "blocks.2.cross_attn" in str(caught.value)
    plan = resolve(load_config(None, SETTINGS | STATIC | {"dit_quantized_ckpt": str(file)}), select_device("cpu"))
    assert "fa3_int8_static_ref" in plan.render()


def test_a_pipeline_of_diffusers_has_no_place_for_scales() -> None:
    config = load_config(None, STATIC | {"model_cls": "diffusers", "model_path": "."})
    with pytest.raises(ConfigError, match="reads scales of each attention"):
        plan_attention(config, select_device("cpu"), 4)
