"""Prompts, metrics, the suite's counting and its command line, without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightx2v.cli import main
from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.eval import cli, compare
from lightx2v.eval.cases import make_cases, parse_seeds
from lightx2v.eval.configs import against, check_comparable, differences, plain, settings
from lightx2v.eval.gate import Limits
from lightx2v.eval.prompts import ATTRIBUTES, Scene, draw_prompts, parse_prompt
from lightx2v.eval.steps import StepRecorder
from lightx2v.eval.suite import run_cases, run_suite
from lightx2v.eval.text import table
from lightx2v.io.media import read_metadata
from lightx2v.platform import select_device
from lightx2v.sampling.loop import Progress
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


def test_the_suite_counts_what_is_right() -> None:
    report = run_suite(red_clip, 30, reference=right_clip)
    asked = [result.case.scene.color for result in report.results]
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
    assert report.points() == pytest.approx(100 * reds / 30) and report.points(reference=True) == 100
    paired = report.paired_adherence()
    assert paired is not None and (paired["lost"], paired["gained"]) == (30 - reds, 0)
    share = reds / 30
    assert paired["points_lost"] == pytest.approx(100 * (1 - share))
    assert paired["points_lost_error"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 29))
    assert report.lowest(3)[0].distance.psnr == summary["psnr_min"]  # type: ignore[union-attr]


def test_prompts_of_another_model_have_no_adherence() -> None:
    cases = make_cases(load_config(), given=["a cat", "a dog"], seeds="0-1,7")
    assert [(case.prompt, case.seed) for case in cases] == [(text, n) for text in ("a cat", "a dog") for n in (0, 1, 7)]
    still = np.full((3, 16, 16, 3), 50, np.uint8)
    report = run_cases(lambda prompt, seed: still + np.uint8(prompt == "a cat"), cases, lambda prompt, seed: still)
    found = report.to_json()
    assert found["adherence"] is None and found["reference_adherence"] is None and found["paired_adherence"] is None
    assert found["distance"]["equal_clips"] == 3
    assert found["distance"]["psnr_mean"] == pytest.approx(20 * math.log10(255))
    assert report.points() is None and "6 clips" in table(report)


@pytest.mark.parametrize("bad", ["", "a", "3-1", "1-", "-1", "1,,2"])
def test_seeds_that_are_none_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="is no seed"):
        parse_seeds(bad)


def test_which_clips_are_made(tmp_path: Path) -> None:
    config = load_config(None, {"prompt": "from the configuration", "seed": 9})
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n a red circle on a black background grows \n")
    assert [(c.prompt, c.seed) for c in make_cases(config)] == [("from the configuration", 9)]
    assert make_cases(config, prompts="4", seed=3) == draw_prompts(4, 3)
    assert make_cases(config, world=True) == draw_prompts(200)
    read = make_cases(config, given=["zero"], prompts=str(file), world=True)
    assert [case.prompt for case in read] == ["zero", "one", "a red circle on a black background grows"]
    assert [case.scene for case in read] == [None, None, Scene("red", "circle", "black", "grows")]
    assert all(case.scene is None for case in make_cases(config, prompts=str(file)))
    twice = make_cases(config, prompts="2", seeds="5,6")
    assert [case.seed for case in twice] == [5, 6, 5, 6] and twice[0].scene == twice[1].scene is not None
    for arguments in ({"prompts": "0"}, {"prompts": "-3"}, {"prompts": str(tmp_path / "absent")}):
        with pytest.raises(ConfigError, match="--prompts"):
            make_cases(config, **arguments)
    with pytest.raises(ConfigError, match="there is no prompt"):
        make_cases(load_config())


def test_latents_are_held_against_the_references_step_by_step() -> None:
    recorder = StepRecorder(2)
    exact = [torch.full((1, 2), float(step)) for step in (1, 2, 3)]
    for size in (0.1, 0.3, 0.5):
        for step, latents in enumerate(exact, 1):
            recorder.reference(Progress(step, 3, latents))
        for step, latents in enumerate(exact, 1):
            recorder.tested(Progress(step, 3, latents * (1 + size * step)))
    found = recorder.result()
    assert found is not None and len(found.by_case) == 2
    assert found.by_case[0] == pytest.approx((0.1, 0.2, 0.3)) and found.by_case[1] == pytest.approx((0.3, 0.6, 0.9))
    assert found.mean == pytest.approx((0.2, 0.4, 0.6))


@pytest.mark.parametrize(
    ("tested", "reason"),
    [
        ([(1, 2, torch.ones(3)), (2, 2, torch.ones(3))], "2 and 3 steps"),
        ([(step, 4, torch.ones(3)) for step in (1, 2, 3, 4)], "other numbers of steps"),
        ([(1, 3, torch.ones(4))], "step 1 have other shapes"),
        ([(1, 3, None)], "tells nobody of its latents"),
        ([], "tells nobody of its steps"),
    ],
)
def test_runs_that_cannot_be_held_against_each_other(tested: list[tuple[int, int, Any]], reason: str) -> None:
    recorder = StepRecorder(2)
    for step in (1, 2, 3):
        recorder.reference(Progress(step, 3, torch.ones(3)))
    for progress in tested:
        recorder.tested(Progress(*progress))
    assert recorder.result() is None and reason in recorder.reason


class FakePipeline:
    """Makes drawn scenes; with `int8` always a red object. Its plan is all that a report reads of one."""

    def __init__(self, config: Config) -> None:
        self.wrong = config.mm_config.mm_type == "int8"
        request = SimpleNamespace(task=config.task, height=config.video.height, width=64, frames=17)
        parts = {"dit": SimpleNamespace(weight_bytes=1000 if self.wrong else 2000)}
        memory = SimpleNamespace(peak=5000)
        self.plan = SimpleNamespace(
            hash="0123456789ab", request=request, components=parts, memory=memory, device=select_device("cpu")
        )

    def generate(
        self, prompt: str, seed: int, quiet: bool, callback: Any = None, image_path: str | None = None
    ) -> np.ndarray:
        assert quiet and (image_path is None or Path(image_path).is_file())
        for step in (1, 2) if callback is not None else ():
            callback(Progress(step, 2, torch.full((2,), 2.0 + self.wrong)))
        return (red_clip if self.wrong else right_clip)(prompt, seed)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mm_type of each pipeline that the command makes; the int8 one shows red objects only."""
    made: list[str] = []

    def pipeline_of(config: Config) -> FakePipeline:
        made.append(config.mm_config.mm_type)
        return FakePipeline(config)

    monkeypatch.setattr(compare, "pipeline_of", pipeline_of)
    return made


INT8 = ["--set", "mm_config.mm_type=int8", "--set", "mm_config.weight_auto_quant=true"]


def test_a_quantized_configuration_is_compared_with_the_unquantized(
    built: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--prompts", "8", "--json", "--save", str(tmp_path / "wrong"), *INT8]) == 0
    assert built == ["int8", "Default"]
    report = json.loads(capsys.readouterr().out)
    assert report["mm_type"] == "int8" and report["reference_adherence"]["all"]["share"] == 1
    wrong = [clip for clip in report["clips"] if clip["wrong"]]
    sheets = sorted((tmp_path / "wrong").iterdir())
    assert len(sheets) == len(wrong) > 0
    assert read_metadata(sheets[0])["prompt"] == wrong[0]["prompt"]
    assert report["steps"] == {"cases": 2, "mean": [0.5, 0.5], "by_case": [[0.5, 0.5]] * 2}
    assert report["tested"]["weight_bytes"] == {"dit": 1000} and report["reference"]["weight_bytes"] == {"dit": 2000}
    assert report["differences"] == {
        "mm_config.mm_type": ["int8", None],
        "mm_config.weight_auto_quant": [True, None],
    }
    assert report["layers"] is None and "diffusers" in report["unavailable"]["layers"]
    assert report["paired_adherence"]["lost"] == len(wrong) and "gate" not in report


def test_the_unquantized_configuration_is_not_compared(built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--prompts", "3"]) == 0
    assert built == ["Default"]
    assert "100.0%" in capsys.readouterr().out


def test_image_to_video_starts_from_text_to_videos_first_frames(built: list[str]) -> None:
    assert main(["eval", "--prompts", "2", "--set", "task=i2v", "--set", "mm_config.mm_type=int8"]) == 0
    assert built == ["int8", "Default", "Default"]


def test_two_configurations_are_compared(built: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fp8.json"
    file.write_text(json.dumps({"mm_config": {"mm_type": "fp8", "weight_auto_quant": True}}))
    assert main(["eval", "--prompt", "a red circle on a black background grows", *INT8, "--against", str(file)]) == 0
    assert "100.0%" in capsys.readouterr().out
    assert main(["eval", "--prompts", "1", *INT8, "--set_against", "mm_config.mm_type=fp8", "--json"]) == 0
    assert built == ["int8", "fp8"] * 2
    report = json.loads(capsys.readouterr().out)
    assert report["differences"] == {"mm_config.mm_type": ["int8", "fp8"]}


def test_clips_of_two_sizes_are_refused(built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--prompts", "1", *INT8, "--set-against", "video.height=32"]) == 2
    assert "makes clips of another height: 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        (["--min-psnr", "90"], "eval: --min-psnr 90: mean PSNR, dB: "),
        (["--min_psnr", "90"], "eval: --min-psnr 90: mean PSNR, dB: "),
        (["--min-ssim", "0.9999"], "eval: --min-ssim 0.9999: mean SSIM: "),
        (["--min-adherence", "80"], "eval: --min-adherence 80: clips as asked, %: "),
        (["--max_adherence_loss", "1.5"], "eval: --max-adherence-loss 1.5: points of adherence lost: "),
    ],
)
def test_the_gate(limit: list[str], line: str, built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--prompts", "6", "--json", *INT8, *limit]) == 1
    shown = capsys.readouterr()
    assert line in shown.err and shown.err.rstrip().endswith("the limit")
    gate = json.loads(shown.out)["gate"]
    assert not gate["passed"] and len(gate["failures"]) == 1
    kept = {"--min": "0", "--max": "100"}[limit[0][:5]]
    assert main(["eval", "--prompts", "6", "--json", *INT8, limit[0], kept]) == 0
    assert json.loads(capsys.readouterr().out)["gate"]["passed"]


def test_equal_clips_keep_every_limit_and_a_limit_asks_for_a_reference(built: list[str]) -> None:
    assert main(["eval", "--prompts", "2", "--min-psnr", "99", "--max-adherence-loss", "0"]) == 0
    assert built == ["Default", "Default"]
    assert main(["eval", "--prompts", "2", "--min-psnr", "99", "--no-reference"]) == 2


def test_what_is_not_measured_does_not_pass() -> None:
    report = run_cases(lambda prompt, seed: np.zeros((1, 16, 16, 3), np.uint8), make_cases(load_config(), given=["x"]))
    lines = Limits(min_psnr=1, max_lpips=1, min_adherence=1, max_adherence_loss=1).failures(report)
    assert len(lines) == 4 and all(line.endswith("not measured") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompts", "0"],
        ["--prompts", "absent.txt"],
        ["--seeds", "x"],
        ["--steps-of", "-1"],
        ["--html-clips", "-1"],
        ["--min-psnr", "nan"],
        ["--against", "absent.json"],
        ["--no-reference", "--set-against", "dtype=float32"],
        ["--set", "mm_config.mm_typ=int8"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], built: list[str]) -> None:
    assert main(["eval", *arguments]) == 2
    assert not built


def test_a_limit_of_lpips_needs_lpips(
    built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "load_lpips", lambda: (None, "no weights"))
    assert main(["eval", "--prompts", "1", "--max-lpips", "0.1"]) == 2
    assert not built and "there is no LPIPS here: no weights" in capsys.readouterr().err


FLAGS = """
-h --help --config_json --set --against --set-against --set_against --reference --no-reference --suite --prompts
--prompt --seed --seeds --steps-of --steps_of --layer-steps --layer_steps --json --html --html-clips --html_clips --save
--debug --min-psnr --min_psnr --min-ssim --min_ssim --max-lpips --max_lpips --min-adherence --min_adherence
--max-adherence-loss --max_adherence_loss
""".split()


def test_the_command_line_is_frozen() -> None:
    parser = cli.build_parser("x")
    assert [flag for action in parser._actions for flag in action.option_strings] == FLAGS


def test_plain_keeps_every_other_setting() -> None:
    chosen = {"sampling.steps": 3, "cache.type": "fora", "attention.type": "fp8_ref", "sampling.cfg_schedule": ":2"}
    config = load_config(str(CONFIGS / "quantization/wan_t2v_int8_converted.json"), chosen)
    whole = plain(config)
    assert whole.sampling.steps == 3 and whole.mm_config.mm_type == "Default"
    assert whole.dit_quantized_ckpt is None and not whole.t5.quantized
    assert whole.cache.type == "none" and whole.attention.type == "auto" and whole.sampling.cfg_schedule is None


def test_settings_of_the_reference_go_over_those_that_are_tested() -> None:
    rules = [{"match": "blocks.0.*", "mm_type": "fp8"}]
    config = load_config(None, {"mm_config.mm_type": "int8", "mm_config.rules": rules, "sampling.steps": 5, "lora": []})
    assert against(config, None, []) == config
    other = against(config, None, ["mm_config.mm_type=nvfp4", "dtype=float32"])
    assert other.mm_config.rules == config.mm_config.rules and other.sampling.steps == 5
    assert differences(config, other) == {"mm_config.mm_type": ("int8", "nvfp4"), "dtype": (None, "float32")}
    assert settings(load_config(None, {"save_result_path": "x.mp4"})) == {}


def test_requests_of_other_frames_are_not_comparable() -> None:
    one, two = (SimpleNamespace(task="t2v", height=16, width=16, frames=n) for n in (5, 9))
    check_comparable(one, one)
    with pytest.raises(ConfigError, match="another frames: 9"):
        check_comparable(one, two)
