"""Prompts, metrics, the suite's counting and its command line, without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lightx2v.cli import main
from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError
from lightx2v.eval import cli
from lightx2v.eval.metrics import psnr, ssim
from lightx2v.eval.prompts import ATTRIBUTES, Scene, draw_prompts, parse_prompt
from lightx2v.eval.suite import run_suite, table
from lightx2v.io.media import read_metadata
from tests.unit.scene_drawing import draw

CONFIGS = Path(__file__).parents[2] / "configs"


def right_clip(prompt: str, seed: int) -> np.ndarray:
    return draw(parse_prompt(prompt), np.random.default_rng(seed)).astype(np.uint8)


def red_clip(prompt: str, seed: int) -> np.ndarray:
    """Always a red object, whatever was asked for."""
    scene = parse_prompt(prompt)
    return right_clip(Scene("red", scene.shape, scene.background, scene.motion).prompt, seed)


def test_a_prompt_says_its_scene() -> None:
    for request in draw_prompts(50):
        assert parse_prompt(request.scene.prompt) == request.scene
    assert parse_prompt(" A Orange square on a gray background stays still.") == Scene(
        "orange", "square", "gray", "stays still"
    )
    with pytest.raises(ConfigError, match="a pink circle"):
        parse_prompt("a pink circle on a gray background grows")


def test_drawing_is_repeatable_and_uniform() -> None:
    assert draw_prompts(5, 1) == draw_prompts(50, 1)[:5] != draw_prompts(5, 2)
    many = draw_prompts(2000)
    for attribute, values in {"color": 6, "shape": 3, "background": 3, "motion": 7}.items():
        drawn = [getattr(request.scene, attribute) for request in many]
        assert all(abs(drawn.count(value) / 2000 - 1 / values) < 0.04 for value in set(drawn))
        assert len(set(drawn)) == values
    assert len({request.seed for request in many}) == 2000


def test_psnr_of_a_known_error() -> None:
    clip = np.full((2, 16, 16, 3), 100, np.uint8)
    assert psnr(clip, clip) == math.inf
    assert psnr(clip, clip + np.uint8(5)) == pytest.approx(10 * math.log10(255**2 / 25))


def test_ssim_agrees_with_its_definition() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 1, 11, 11, 1)).astype(np.uint8).repeat(3, axis=-1)
    assert ssim(first, first) == pytest.approx(1)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = first[0, :, :, 0].astype(float), second[0, :, :, 0].astype(float)
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    cov = (window * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(first, second) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_clips_of_different_sizes_are_refused(metric: object) -> None:
    with pytest.raises(ValueError, match="wanted two of uint8"):
        metric(np.zeros((1, 16, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.uint8))  # type: ignore[operator]


def test_the_suite_counts_what_is_right() -> None:
    report = run_suite(red_clip, 30, reference=right_clip)
    asked = [result.request.scene.color for result in report.results]
    reds = asked.count("red")
    assert 0 < reds < 30
    assert report.right() == {"color": reds, "shape": 30, "background": 30, "motion": 30, "all": reds}
    assert report.right(reference=True) == dict.fromkeys([*ATTRIBUTES, "all"], 30)
    summary = report.distance_summary()
    assert summary["equal_clips"] == reds
    finite = [distance.psnr for distance in report.distances if math.isfinite(distance.psnr)]
    assert summary["psnr_mean"] == pytest.approx(np.mean(finite)) and summary["psnr_min"] == min(finite)
    text = table(report)
    assert f"{reds / 30:.1%}" in text and "and " in text.splitlines()[-1]
    json.dumps(report.to_json(), allow_nan=False)


class FakePipeline:
    class plan:
        hash = "0123456789ab"

    def __init__(self, wrong: bool) -> None:
        self.wrong = wrong

    def generate(self, prompt: str, seed: int, quiet: bool, image_path: str | None = None) -> np.ndarray:
        assert image_path is None or Path(image_path).is_file()
        return (red_clip if self.wrong else right_clip)(prompt, seed)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mm_type of each pipeline that the command makes; the int8 one shows red objects only."""
    made: list[str] = []

    def pipeline_of(config: object) -> FakePipeline:
        made.append(config.mm_config.mm_type)  # type: ignore[attr-defined]
        return FakePipeline(wrong=made[-1] == "int8")

    monkeypatch.setattr(cli, "pipeline_of", pipeline_of)
    return made


def test_a_quantized_configuration_is_compared_with_the_unquantized(
    built: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized = ["--set", "mm_config.mm_type=int8", "--set", "mm_config.weight_auto_quant=true"]
    assert main(["eval", "--prompts", "8", "--json", "--save", str(tmp_path / "wrong"), *quantized]) == 0
    assert built == ["int8", "Default"]
    report = json.loads(capsys.readouterr().out)
    assert report["mm_type"] == "int8" and report["reference_adherence"]["all"]["share"] == 1
    wrong = [clip for clip in report["clips"] if clip["wrong"]]
    sheets = sorted((tmp_path / "wrong").iterdir())
    assert len(sheets) == len(wrong) > 0
    assert read_metadata(sheets[0])["prompt"] == wrong[0]["prompt"]


def test_the_unquantized_configuration_is_not_compared(built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--prompts", "3"]) == 0
    assert built == ["Default"]
    assert "100.0%" in capsys.readouterr().out


def test_image_to_video_starts_from_text_to_videos_first_frames(built: list[str]) -> None:
    assert main(["eval", "--prompts", "2", "--set", "task=i2v", "--set", "mm_config.mm_type=int8"]) == 0
    assert built == ["int8", "Default", "Default"]


@pytest.mark.parametrize("arguments", [["--prompts", "0"], ["--set", "mm_config.mm_typ=int8"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], built: list[str]) -> None:
    assert main(["eval", *arguments]) == 2
    assert not built


def test_plain_keeps_every_other_setting() -> None:
    chosen = {"sampling.steps": 3, "cache.type": "fora", "attention.type": "fp8_ref", "sampling.cfg_schedule": ":2"}
    config = load_config(str(CONFIGS / "quantization/wan_t2v_int8_converted.json"), chosen)
    plain = cli.plain(config)
    assert plain.sampling.steps == 3 and plain.mm_config.mm_type == "Default"
    assert plain.dit_quantized_ckpt is None and not plain.t5.quantized
    assert plain.cache.type == "none" and plain.attention.type == "auto" and plain.sampling.cfg_schedule is None
