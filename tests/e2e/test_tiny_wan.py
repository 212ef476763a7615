"""The embedded model through the Python API: prompts decide the picture, quantization keeps it, settings count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightx2v import LightX2VPipeline
from lightx2v.errors import ConfigError
from lightx2v.eval.detector import detect
from lightx2v.eval.metrics import psnr
from lightx2v.eval.prompts import parse_prompt
from lightx2v.io.media import read_metadata, read_video, write_result
from lightx2v.io.weights import Checkpoint

PROMPTS = (
    "a red circle on a white background moves right",
    "a blue square on a gray background grows",
    "an orange triangle on a black background stays still",
)


def shows(frames: np.ndarray, prompt: str) -> bool:
    scene, found = parse_prompt(prompt), detect(frames)
    return all(getattr(found, name) == getattr(scene, name) for name in ("color", "shape", "background", "motion"))


@pytest.fixture(scope="module")
def default() -> LightX2VPipeline:
    return LightX2VPipeline(device="cpu").create_generator()


@pytest.fixture(scope="module")
def frames(default: LightX2VPipeline) -> dict[str, np.ndarray]:
    """Each prompt's frames by the unquantized model, seed 1."""
    return {prompt: default.generate(prompt, seed=1, quiet=True) for prompt in PROMPTS}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prompt_decides_the_picture(prompt: str, frames: dict[str, np.ndarray]) -> None:
    assert frames[prompt].shape == (17, 64, 64, 3)
    assert shows(frames[prompt], prompt)


def test_one_pipeline_serves_many_requests(default: LightX2VPipeline, frames: dict[str, np.ndarray]) -> None:
    small = default.generate(PROMPTS[1], seed=2, steps=2, height=32, width=48, frames=5, quiet=True)
    assert small.shape == (5, 32, 48, 3)
    again = default.generate(PROMPTS[0], seed=1, quiet=True)
    assert np.array_equal(again, frames[PROMPTS[0]]), "a request leaves nothing behind"
    other = default.generate(PROMPTS[0], seed=2, quiet=True)
    assert not np.array_equal(other, again)
    with pytest.raises(ConfigError, match="48"):
        default.generate(PROMPTS[0], height=50)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-b128", "int8-reference"])
def test_quantized_while_loading(scheme: str, frames: dict[str, np.ndarray]) -> None:
    pipe = LightX2VPipeline(device="cpu").enable_quantize(dit_quantized=True, quant_scheme=scheme)
    quantized = pipe.generate(PROMPTS[0], seed=1, quiet=True)
    assert {layer.mm_type for layer in pipe.plan.components["dit"].layers} == {scheme}
    assert psnr(quantized, frames[PROMPTS[0]]) >= 28
    assert not np.array_equal(quantized, frames[PROMPTS[0]]), "nothing was quantized"


def test_rules_mix_types(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    rules = [{"match": "blocks.0.*", "mm_type": "fp8"}, {"match": "*.ffn.2", "mm_type": "Default-Force-FP32"}]
    config.write_text(json.dumps({"mm_config": {"mm_type": "int8", "weight_auto_quant": True, "rules": rules}}))
    pipe = LightX2VPipeline(device="cpu").create_generator(config_json=str(config))
    types = {layer.name: layer.mm_type for layer in pipe.plan.components["dit"].layers}
    assert types["blocks.0.self_attn.q"] == "fp8"
    assert types["blocks.0.ffn.2"] == "Default-Force-FP32", "the last match wins"
    assert types["blocks.1.ffn.0"] == "int8"
    assert shows(pipe.generate(PROMPTS[0], seed=1, quiet=True), PROMPTS[0])


def test_unloading_changes_nothing(tmp_path: Path, frames: dict[str, np.ndarray]) -> None:
    config = tmp_path / "c.json"
    config.write_text('{"unload_modules": true}')
    pipe = LightX2VPipeline(device="cpu").create_generator(config_json=str(config))
    for _ in range(2):
        assert np.array_equal(pipe.generate(PROMPTS[0], seed=1, quiet=True), frames[PROMPTS[0]])
    loads = [stage.name for stage in pipe.timer.stages if stage.name.startswith("load")]
    assert loads == ["load t5", "load dit", "load vae"], "every component is loaded again for each request"


def test_image_to_video_starts_from_the_image(tmp_path: Path, frames: dict[str, np.ndarray]) -> None:
    first = frames[PROMPTS[0]][:1]
    image = tmp_path / "first.png"
    write_result(first, str(image), 8, {})
    video = LightX2VPipeline(task="i2v", device="cpu").generate(PROMPTS[0], seed=3, image_path=str(image), quiet=True)
    assert shows(video, PROMPTS[0])
    assert psnr(video[:1], first) > 20


def test_result_file_says_how_it_was_made(default: LightX2VPipeline, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.mp4"
    made = default.generate(PROMPTS[2], seed=7, steps=2, save_result_path=str(path), quiet=True)
    assert read_video(str(path)).shape == made.shape
    metadata = read_metadata(str(path))
    assert metadata["prompt"] == PROMPTS[2]
    assert metadata["seed"] == "7"
    assert metadata["plan"] == default.plan.hash
    assert json.loads(metadata["request"])["steps"] == 2


def test_the_embedded_model_is_light() -> None:
    root = default_root()
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) <= 24_000_000
    dit = Checkpoint.open(root / "diffusion_pytorch_model.safetensors")
    assert dit.tensors["blocks.0.self_attn.q.weight"].shape[0] % 128 == 0


def default_root() -> Path:
    import lightx2v

    return Path(lightx2v.__file__).parent / "assets" / "tiny-wan"
