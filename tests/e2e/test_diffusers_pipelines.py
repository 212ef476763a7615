"""`model_cls: diffusers` against diffusers' own pipelines: equal where no feature is on, near where one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from torch import nn

from lightx2v.cli import main
from lightx2v.config.load import load_config
from lightx2v.convert.options import Options
from lightx2v.convert.run import convert
from lightx2v.foreign import PipelineRunner
from lightx2v.io.media import read_metadata, read_video
from lightx2v.mm.linear import QuantLinear
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.sampling.loop import Progress
from tests.models.tiny_pipelines import EXTRA, SEED, STEPS, WRITERS, diffusers_frames, psnr, settings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def pipeline(name: str, folder: Path, **overrides: Any) -> LightX2VPipeline:
    return LightX2VPipeline.from_config(load_config(None, settings(name, folder, **overrides)))


def loaded(pipe: LightX2VPipeline) -> Any:
    assert isinstance(pipe.runner, PipelineRunner)
    return pipe.runner.pipeline


def quantized(module: nn.Module) -> int:
    return sum(isinstance(layer, QuantLinear) for layer in module.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRITERS)
def test_equal_to_diffusers_when_no_feature_is_on(name: str, dtype: str, folders: dict[str, Path]) -> None:
    ours = pipeline(name, folders[name], dtype=dtype, **{"attention.type": "torch_sdpa"}).generate(quiet=True)
    theirs = DiffusionPipeline.from_pretrained(folders[name], dtype=getattr(torch, dtype))
    wanted = diffusers_frames(theirs, name)
    assert wanted.std() > 10, "the comparison says nothing about a blank picture"
    assert np.array_equal(ours, wanted)


def test_image_to_image_of_a_text_to_image_directory(tmp_path: Path, folders: dict[str, Path]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    picture.save(tmp_path / "in.png")
    given = {"task": "i2i", "image_path": str(tmp_path / "in.png"), "sampling.strength": 0.8}
    pipe = pipeline("sdxl", folders["sdxl"], **given)
    theirs = StableDiffusionXLImg2ImgPipeline.from_pretrained(folders["sdxl"])
    wanted = diffusers_frames(theirs, "sdxl", image=picture, strength=0.8)
    assert wanted.shape == (1, 32, 48, 3)
    assert np.array_equal(pipe.generate(quiet=True), wanted)


@pytest.mark.parametrize(("mm_type", "least"), [("int8", 34), ("fp8", 24)])
@pytest.mark.parametrize("name", WRITERS)
def test_quantized_denoiser_and_text_encoders(name: str, mm_type: str, least: float, folders: dict[str, Path]) -> None:
    plain = pipeline(name, folders[name]).generate(quiet=True)
    pipe = pipeline(name, folders[name], **{"mm_config.mm_type": mm_type, "mm_config.weight_auto_quant": True})
    got = pipe.generate(quiet=True)
    denoiser = loaded(pipe).components.get("unet") or loaded(pipe).transformer
    assert quantized(denoiser) == len(pipe.plan.components["unet" if name == "sdxl" else "transformer"].layers) > 20
    assert least < psnr(got, plain) < 90
    pipe = pipeline(name, folders[name], **{"t5.quantized": True, "t5.quant_scheme": "int8"})
    got = pipe.generate(quiet=True)
    encoders = [part for part in pipe.plan.components if part.startswith("text_encoder")]
    assert all(quantized(getattr(loaded(pipe), part)) >= 12 for part in encoders)
    assert 34 < psnr(got, plain) < 90


def test_converted_checkpoint_is_what_quantizing_at_load_gives(tmp_path: Path, folders: dict[str, Path]) -> None:
    options = {"model_type": "diffusers", "quantized": True, "linear_type": "int8", "non_linear_dtype": "torch.float32"}
    convert(Options(folders["sdxl"] / "unet", tmp_path, **options))  # type: ignore[arg-type]
    at_load = pipeline("sdxl", folders["sdxl"], **{"mm_config.mm_type": "int8", "mm_config.weight_auto_quant": True})
    from_disk = pipeline("sdxl", folders["sdxl"], **{"mm_config.mm_type": "auto", "dit_quantized_ckpt": str(tmp_path)})
    assert {layer.mm_type for layer in from_disk.plan.components["unet"].layers} == {"int8"}
    assert np.array_equal(at_load.generate(quiet=True), from_disk.generate(quiet=True))


def test_requests_differ_as_asked_and_leave_nothing_behind(folders: dict[str, Path]) -> None:
    pipe = pipeline("sd3", folders["sd3"], **{"cache.type": "taylorseer", "cache.interval": 2})
    seen: list[Progress] = []
    first = pipe.generate(quiet=True, callback=seen.append)
    assert [(progress.step, progress.steps) for progress in seen] == [(i + 1, STEPS) for i in range(STEPS)]
    other = pipe.generate(quiet=True, seed=SEED + 1, steps=3, shift=1.0, height=48, width=32)
    assert other.shape == (1, 48, 32, 3)
    assert np.array_equal(pipe.generate(quiet=True), first)
    theirs = DiffusionPipeline.from_pretrained(folders["sd3"])
    theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, shift=1.0)
    plain = pipeline("sd3", folders["sd3"])
    plain.generate(quiet=True)
    assert np.array_equal(plain.generate(quiet=True, shift=1.0), diffusers_frames(theirs, "sd3"))


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "diffusers").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_runs(path: Path, folders: dict[str, Path]) -> None:
    name = next((name for name in WRITERS if path.stem.startswith(name)), "sd3")
    small = {"model_path": str(folders[name]), "device": "cpu", "dtype": "float32", "sampling.steps": 4, "prompt": "a"}
    small |= {"pipeline_args": EXTRA["pixart"]} if name == "pixart" else {}
    small |= {"text_len": 24, "video.frames": 9} if name == "cogvideox" else {}
    config = load_config(str(path), {**small, "video.height": 32, "video.width": 32})
    assert LightX2VPipeline.from_config(config).generate(quiet=True).shape[1:] == (32, 32, 3)


def test_command_line(tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_cls", "diffusers", "--task", "t2i", "--model_path", str(folders["sdxl"]), "--device", "cpu"]
    assert main(["explain", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["components"].keys() == {"unet", "text_encoder", "text_encoder_2"}
    result = tmp_path / "cat.png"
    run = [*words, "--prompt", "a cat", "--set", "sampling.steps=2", "--save_result_path", str(result)]
    assert main(["generate", *run]) == 0
    assert read_video(result).shape == (1, 32, 32, 3)
    assert read_metadata(result)["prompt"] == "a cat"
    assert main(["explain", *words, "--set", 'pipeline_args={"guidance_resale": 1}']) == 2
    assert "did you mean 'guidance_rescale'" in capsys.readouterr().err
