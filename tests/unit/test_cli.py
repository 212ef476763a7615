from __future__ import annotations

import json
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from lightx2v import cli, doctor, infer
from lightx2v.attention.base import ATTENTION
from lightx2v.config.load import load_config
from lightx2v.config.schema import Config, schema_text
from lightx2v.errors import ConfigError, ResourceError
from lightx2v.platform import select_device

GENERATE_FLAGS = """
-h --help --debug --model_cls --task --model_path --prompt --negative_prompt --image_path --device --config_json --seed
--save_result_path --save_video_path --warmup --use_prompt_enhancer --set --json --dry-run
""".split()


class FakePlan:
    def __init__(self, config: Config) -> None:
        self.config = config

    def render(self) -> str:
        return f"plan of {self.config.prompt!r}"

    def to_json(self) -> dict[str, Any]:
        return {"prompt": self.config.prompt}


@pytest.fixture(autouse=True)
def log_to_stderr() -> Iterator[None]:
    """The command sends the log to the stderr of its test; put it back afterwards."""
    yield
    logger.remove()
    logger.add(sys.stderr)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Replaces the engine; gives the configs that it ran."""
    configs: list[Config] = []

    def generate(config: Config) -> Path:
        configs.append(config)
        return Path("made.mp4")

    def open_plan(config: Config) -> FakePlan:
        select_device(config.device)
        return FakePlan(config)

    runner = types.ModuleType("lightx2v.runner")
    monkeypatch.setattr(runner, "generate", generate, raising=False)
    monkeypatch.setattr(runner, "open_plan", open_plan, raising=False)
    monkeypatch.setitem(sys.modules, "lightx2v.runner", runner)
    return configs


def raising(error: BaseException) -> Any:
    def run() -> int:
        raise error

    return run


def flags(parser: cli.Parser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def test_the_command_line_is_frozen() -> None:
    verbs = ["generate", "explain", "convert", "calibrate", "eval", "bench", "doctor", "schema"]
    assert list(cli.VERBS) == list(cli.HELP) == verbs
    generate, explain = cli.run_parser("x", "", dry_run=True), cli.run_parser("x", "", dry_run=False)
    assert sorted(flags(generate)) == sorted(GENERATE_FLAGS)
    assert sorted(flags(explain)) == sorted(set(GENERATE_FLAGS) - {"--dry-run"})


@pytest.mark.parametrize("verb", [None, "generate", "explain", "doctor", "schema"])
def test_help_imports_nothing_heavy(verb: str | None) -> None:
    code = f"""
import sys
from lightx2v import cli
try:
    cli.main({[verb, "--help"] if verb else ["--help"]})
except SystemExit as stop:
    assert stop.code == 0
print(sorted({{"torch", "pydantic", "numpy", "loguru"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: lightx2v") and run.stdout.endswith("[]\n")


@pytest.mark.parametrize("module", ["lightx2v", "lightx2v.infer"])
def test_runs_as_a_module(module: str) -> None:
    run = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "usage:" in run.stdout


def test_generate_passes_every_flag(ran: list[Config], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"seed": 1, "prompt": "json", "sampling": {"steps": 4, "shift": 3}}')
    text = {name: f"a {name}" for name, _ in cli.SETTING_FLAGS} | {"task": "i2v"}
    argv = [part for name, value in text.items() for part in (f"--{name}", value)]
    argv += ["--config_json", str(path), "--seed", "7", "--save_video_path", "a.gif", "--set", "sampling.shift=2"]
    assert infer.main(argv) == 0
    expected = {**text, "seed": 7, "save_result_path": "a.gif", "sampling.steps": 4, "sampling.shift": 2}
    assert ran == [load_config(None, expected)]
    assert capsys.readouterr().out == "made.mp4\n"


def test_without_arguments_the_embedded_model_runs(ran: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--json"]) == 0
    captured = capsys.readouterr()
    assert ran == [Config()] and json.loads(captured.out) == {"result": "made.mp4"}
    assert "tiny-wan" in captured.err


def test_empty_prompt_on_the_command_line_wins(ran: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"negative_prompt": "blurry"}')
    cli.main(["generate", "--config_json", str(path), "--negative_prompt", "", "--image_path", ""])
    assert ran == [Config()]


@pytest.mark.parametrize("argv", [["explain"], ["generate", "--dry-run"]])
def test_plan_is_printed_and_nothing_runs(
    ran: list[Config], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*argv, "--device", "cpu", "--prompt", "a red circle"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "plan of 'a red circle'\n"
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "a red circle"}
    assert ran == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate"], "unknown verb 'genrate' - did you mean 'generate'?"),
        (["calibrat"], "unknown verb 'calibrat' - did you mean 'calibrate'?\n  allowed: generate"),
        (["--versoin"], "unknown argument '--versoin'"),
        (["generate", "--use_prompt_enhancer"], "--use_prompt_enhancer: not supported by this version"),
        (["generate", "--set", "seeed=1"], "unknown key 'seeed' - did you mean 'seed'?"),
        (["generate", "--task", "t2x"], "arguments: task is \"t2x\"\n  allowed: 't2v', 'i2v', 't2i' or 'i2i'"),
        (["generate", "--model_path", ""], 'model_path is ""'),
        (["explain", "--config_json", "absent.json"], "absent.json: cannot be read: No such file"),
        (["explain", "--device", "tpu"], "there is no 'tpu' here\n  allowed: auto"),
    ],
)
def test_mistakes_exit_with_2_and_a_message(
    ran: list[Config], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert ran == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--promt", "x"], "unknown argument '--promt' - did you mean '--prompt'?"),
        (["generate", "--model-path=x"], "unknown argument '--model-path' - did you mean '--model_path'?"),
        (["generate", "--negative", "x"], "unknown argument '--negative'"),
        (["generate", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["explain", "--dry-run"], "unknown argument '--dry-run'"),
        (["doctor", "--jsn"], "did you mean '--json'?"),
    ],
)
def test_wrong_flags_exit_with_2_and_a_suggestion(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("here", "wrong", do="mend it"), 2, "here: wrong\n  do: mend it\n"),
        (ResourceError("disk", "full"), 1, "disk: full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("first\nsecond"), 1, "RuntimeError: first\n  do: run again with --debug\n"),
        (AssertionError(), 1, "AssertionError: no message\n  do: run again with --debug\n"),
    ],
)
def test_exit_codes_and_tracebacks(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.guarded(raising(error), debug=False) == code
    assert capsys.readouterr().err == message
    assert cli.guarded(raising(error), debug=True) == code
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.endswith(message.replace("\n  do: run again with --debug", ""))


def test_reader_that_stops_early_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m lightx2v schema | true"
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == ""


def test_log_goes_to_stderr_at_the_wanted_level(capsys: pytest.CaptureFixture[str]) -> None:
    for debug in (False, True):
        cli.start_log(debug)
        logger.info("told")
        logger.debug("detail")
        captured = capsys.readouterr()
        assert captured.out == "" and "told" in captured.err and ("detail" in captured.err) is debug


@pytest.mark.parametrize(("verb", "module"), [("convert", "lightx2v.convert.cli"), ("eval", "lightx2v.eval.cli")])
def test_delegated_verbs_get_the_rest_of_the_line(verb: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def main(argv: list[str]) -> int:
        calls.append(argv)
        return 5

    fake = types.ModuleType(module)
    monkeypatch.setattr(fake, "main", main, raising=False)
    monkeypatch.setitem(sys.modules, module, fake)
    assert cli.main([verb, "--help", "--debug", "-x", "generate"]) == 5
    assert calls == [["--help", "--debug", "-x", "generate"]]


def test_schema_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert capsys.readouterr().out == schema_text()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)


def test_doctor_reports_every_library(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"][-1]["torch_name"] == "cpu"
    assert report["packages"]["torch"]["version"] == torch.__version__
    assert set(report["kernels"]) == {*doctor.KERNELS, "onednn", "cpu kernels"}
    assert list(report["attention"]) == list(ATTENTION)
    for entry in [*report["packages"].values(), *report["kernels"].values(), *report["attention"].values()]:
        assert bool(entry["version"]) != bool(entry["reason"])
        assert bool(entry["reason"]) == bool(entry["install"] or entry["needs"])
    text = doctor.render(report)
    assert all(name in text for group in ("packages", "kernels", "attention") for name in report[group])


def test_doctor_finds_a_library_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sgl_kernel.py").write_text("raise ImportError('undefined symbol: _Zn')")
    (tmp_path / "vllm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = doctor._library("sgl_kernel")
    assert broken["version"] is None and broken["install"] == "pip install sglang-kernel"
    assert str(broken["reason"]).endswith("its import fails: ImportError: undefined symbol: _Zn")
    assert doctor._library("vllm") == {"version": "unknown", "reason": None, "install": None, "needs": None}
