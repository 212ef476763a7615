"""Features of whole runs of tiny-wan through the Python API: LoRAs that are exchanged, another decoder, a warm-up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.runner import generate
from tests.models.test_tae import taehv_state

PROMPT = "a red circle on a black background moves left"
SHORT = {"sampling.steps": 2, "video.frames": 5}


def write_lora(path: Path, seed: int, layer: str = "blocks.1.ffn.0", size: tuple[int, int] = (512, 256)) -> str:
    generator = torch.Generator().manual_seed(seed)
    n, k = size
    save_file(
        {
            f"diffusion_model.{layer}.lora_A.weight": torch.randn(8, k, generator=generator) / k**0.5,
            f"diffusion_model.{layer}.lora_B.weight": torch.randn(n, 8, generator=generator) / 4,
        },
        path,
    )
    return str(path)


def pipeline(**settings: object) -> LightX2VPipeline:
    return LightX2VPipeline.from_config(load_config(None, SHORT | settings))


def frames(pipe: LightX2VPipeline) -> np.ndarray:
    return pipe.generate(PROMPT, seed=3, quiet=True)


@pytest.mark.parametrize("settings", [{}, {"mm_config.mm_type": "int8", "mm_config.weight_auto_quant": True}])
def test_loras_are_exchanged_without_loading_again(settings: dict[str, object], tmp_path: Path) -> None:
    first = {"path": write_lora(tmp_path / "first.safetensors", 1)}
    second = {"path": write_lora(tmp_path / "second.safetensors", 2), "strength": 0.5}
    plain, loaded = frames(pipeline(**settings)), frames(pipeline(**settings, lora=[first, second]))
    pipe = pipeline(**settings)
    assert np.array_equal(frames(pipe), plain)
    with pipe.runner.components.use("dit", pipe.timer) as dit:
        model = dit.model
    pipe.switch_lora([first, second])
    assert np.array_equal(frames(pipe), loaded) and not np.array_equal(loaded, plain)
    assert [lora.name for lora in pipe.plan.loras.loras] == ["first", "second"]
    pipe.switch_lora([])
    assert np.array_equal(frames(pipe), plain)
    with pipe.runner.components.use("dit", pipe.timer) as dit:
        assert dit.model is model


def test_a_lora_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    pipe = pipeline()
    before = frames(pipe)
    other = write_lora(tmp_path / "other.safetensors", 1, "transformer_blocks.3.attn.to_q", (64, 64))
    with pytest.raises((CheckpointError, ConfigError), match=r"other\.safetensors"):
        pipe.switch_lora([{"path": other}])
    assert np.array_equal(frames(pipe), before) and not pipe.plan.loras


def test_a_tiny_decoder_takes_the_place_of_the_vae(tmp_path: Path) -> None:
    path = tmp_path / "taew2_1.safetensors"
    save_file(taehv_state((16, 16, 8, 8)), path)
    pipe = pipeline(**{"vae.tae": True, "vae.tae_path": str(path)})
    assert frames(pipe).shape == (5, 64, 64, 3)
    assert "load vae" not in [stage.name for stage in pipe.timer.stages]
    with pytest.raises(CheckpointError, match="tiny autoencoder"):
        frames(pipeline(**{"vae.tae": True}))


def test_a_warm_up_does_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = LightX2VPipeline.from_config(Config()).native.run.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr("lightx2v.runner.Runner.run", lambda *args, **more: calls.append(more) or run(*args, **more))
    for warm in (False, True):
        settings = SHORT | {"prompt": PROMPT, "save_result_path": str(tmp_path / f"{warm}.png"), "warmup": warm}
        generate(load_config(None, settings))

    assert len(calls) == 3
    first, second = (np.asarray(Image.open(tmp_path / f"{warm}.png")) for warm in (False, True))
    assert np.array_equal(first, second)
