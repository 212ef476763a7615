"""What `lightx2v calibrate --cache` measures, and that a cache can be had from its file."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightx2v.calibrate.cli import main, read_prompts
from lightx2v.calibrate.fit import MIN_STEPS, check_steps, fit_signal, mean_ratios
from lightx2v.calibrate.recorder import Recorder, Track
from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError
from lightx2v.eval.metrics import psnr
from lightx2v.eval.prompts import parse_prompt
from lightx2v.features.cache import Calibration
from lightx2v.models.base import Branch, StepContext, Stream
from lightx2v.pipeline import LightX2VPipeline
from tests.models.cache_runs import DoubleDiT, double_conditions, run_request, trained_wan, wan_conditions

PROMPTS = ("a red circle on a white background moves left", "a blue square on a black background grows")


def change(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().sum() / old.abs().sum())


def test_a_recorder_changes_nothing_and_measures_what_the_methods_need() -> None:
    signals: dict[Branch, list[Tensor]] = {"cond": [], "uncond": []}
    residuals: dict[Branch, list[Tensor]] = {"cond": [], "uncond": []}

    class Watched(DoubleDiT):
        def head(self, stream: Stream, context: StepContext) -> Tensor:
            before, _ = self.embed(self.latents, context.time, context.prepared)
            signals[context.branch].append(self.signal(before, context))
            residuals[context.branch].append(stream.x - before.x)
            return super().head(stream, context)

        def embed(self, latents: Tensor, *args: object, **options: object) -> tuple[Stream, StepContext]:
            self.latents = latents
            return super().embed(latents, *args, **options)  # type: ignore[arg-type]

    recorder, dit, shape = Recorder(), Watched(), (1, 8, 2, 4, 4)
    recorded = run_request(dit, double_conditions(), shape, recorder, steps=6)
    assert recorder.run is not None and recorder.run.steps == 6
    plain = run_request(DoubleDiT(), double_conditions(), shape, steps=6)
    assert torch.equal(recorded.latents, plain.latents)
    for branch, track in recorder.tracks[0].items():
        of_signal, of_stack = signals[branch], residuals[branch]
        assert track.signals == {"head": pytest.approx([change(b, a) for a, b in pairwise(of_signal)])}
        sizes = [r.norm(dim=-1) for r in of_stack]
        ratios = [float((b / a).mean()) for a, b in pairwise(sizes)]
        assert track.ratios == pytest.approx(ratios)
        assert len(track.outputs) == 5


def test_a_signal_of_time_is_recorded_as_the_head_and_as_the_blocks_read_it() -> None:
    dit, recorder = trained_wan(), Recorder()
    run_request(dit, wan_conditions(dit), (1, 16, 3, 4, 4), recorder, steps=5)
    assert recorder.run is not None
    for name in ("head", "blocks"):
        signal = getattr(recorder.run.time, name)
        wanted = [change(signal[step], signal[step - 1]) for step in range(1, 5)]
        for track in recorder.tracks[0].values():
            assert track.signals[name] == pytest.approx(wanted)


def tracks(coefficients: tuple[float, ...], steps: int) -> list[dict[Branch, Track]]:
    """Five requests whose outputs follow the signal by a polynomial, one of them badly."""
    x = list(np.linspace(0.02, 0.4, steps - 1))
    y = [float(v) for v in np.polyval(coefficients, x)]
    good = Track({"head": x, "blocks": x}, y, [0.9] * (steps - 1))
    bad = Track({"head": x, "blocks": x}, [9.0] * (steps - 1), [0.4] * (steps - 1))
    return [{"cond": good}, {"cond": good}, {"cond": bad}, {"cond": good}, {"cond": good}]


@pytest.mark.parametrize("name", ["head", "blocks"])
def test_a_polynomial_is_found_again(name: str) -> None:
    coefficients = (2.0, -1.0, 0.5, 0.3, 0.01)
    fit = fit_signal(tracks(coefficients, 20), name)
    assert fit is not None
    np.testing.assert_allclose(fit.coefficients, coefficients, rtol=1e-6)
    assert fit.error < 1e-9
    for share in (0.75, 0.5):
        assert fit.computed(fit.threshold(share)) <= share * 20 < fit.computed(fit.threshold(share) / 1.06)
    assert fit.computed(0.0) == 20


def test_there_is_no_fit_without_the_signal() -> None:
    assert fit_signal([{"cond": Track({"head": [0.1] * 9}, [0.1] * 9, [1.0] * 9)}], "blocks") is None


def test_ratios_are_means_over_requests() -> None:
    assert mean_ratios(tracks((1.0,), 4)) == {"cond": pytest.approx((1.0, 0.8, 0.8, 0.8))}


def test_too_few_steps() -> None:
    check_steps(MIN_STEPS)
    with pytest.raises(ConfigError, match=r"sampling\.steps"):
        check_steps(MIN_STEPS - 1)


def test_prompts_come_from_flags_and_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    config = load_config(None, {"prompt": "of the configuration"}, [])
    assert read_prompts(["zero"], str(file), config) == ["zero", "one", "two"]
    assert read_prompts([], None, config) == ["of the configuration"]
    drawn = read_prompts([], None, load_config(None, {}, []))
    assert len(set(drawn)) > 4 and all(parse_prompt(prompt) for prompt in drawn), "of the embedded model's own world"
    with pytest.raises(ConfigError, match="--prompt"):
        read_prompts([], None, load_config(None, {"model_path": "elsewhere"}, []))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts([], str(tmp_path / "missing"), config)


def test_from_a_calibration_to_videos_near_the_plain_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way on tiny-wan: measure, then generate with each method that needs the file, and one that does not."""
    file = tmp_path / "tiny-wan.json"
    sets = ["sampling.steps=12", "dtype=float32"]
    flags = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    settings = [flag for value in sets for flag in ("--set", value)]
    assert main(["--cache", *flags, "--save", str(file), "--json", *settings]) == 0
    printed = json.loads(capsys.readouterr().out)
    made = Calibration.read(file)
    assert (made.family, made.width, made.blocks, made.steps, made.prompts) == ("wan2.1", 256, 4, 12, 2)
    assert tuple(printed["head"]) == made.head and len(made.head) == len(made.blocks_signal) == 5
    assert set(made.ratios) == {"cond", "uncond"} and len(made.ratios["cond"]) == 12
    assert all(0.5 < ratio < 1.5 for ratios in made.ratios.values() for ratio in ratios)

    def video(*options: str) -> tuple[np.ndarray, object]:
        config = load_config(None, {}, [*sets, *options])
        pipe = LightX2VPipeline.from_config(config)
        return pipe.generate(prompt=PROMPTS[0], seed=3, quiet=True), pipe.plan.cache

    plain, nothing = video()
    assert nothing is None
    threshold = next(iter(printed["fits"]["head"]["computed_by_threshold"]))
    for options in (
        ("cache.type=teacache", f"cache.threshold={threshold}", f"cache.file={file}"),
        ("cache.type=magcache", f"cache.file={file}"),
        ("cache.type=fbcache", "cache.threshold=0.2"),
    ):
        found, cache = video(*options)
        report = cache.report  # type: ignore[attr-defined]
        assert 0 < report.computed_forwards < report.forwards == 24
        assert psnr(found, plain) > 25
