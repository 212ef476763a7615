"""The machinery of `lightx2v bench`: taking turns, statistics, reports, choices. No model, and a clock that is set."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightx2v.bench import measure as measuring
from lightx2v.bench import work
from lightx2v.bench.cli import read_rows, read_size, report_argv
from lightx2v.bench.host import cores, hardware, limited_threads
from lightx2v.bench.inputs import Size, token_count
from lightx2v.bench.measure import Candidate, Measured, Staged, Timing, measure, relative_error
from lightx2v.bench.peers import base
from lightx2v.bench.peers.base import Choice, Peer, choose
from lightx2v.bench.report import Case, Column, Report, write_markdown
from lightx2v.bench.shapes import expand_libraries, read_shapes
from lightx2v.errors import ConfigError, LightX2VError
from lightx2v.platform import select_device
from lightx2v.registry import Registry

CPU = select_device("cpu")


class Clock:
    """Stands for time.perf_counter: only work lets it pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def work(self, name: str, seconds: list[float], value: float = 1.0) -> Callable[[], Tensor]:
        """A work whose calls take `seconds` in turn, the last of them for ever."""
        left = list(seconds)

        def run() -> Tensor:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return torch.full((4,), value)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: made.now)
    yield made


def candidate(name: str, run: Callable[[], Any], kind: str = "lightx2v", **facts: Any) -> Candidate:
    return Candidate(name, kind, lambda: (run, facts))  # type: ignore[arg-type]


def failing(error: Exception) -> Callable[[], Tensor]:
    def run() -> Tensor:
        raise error

    return run


def test_candidates_take_turns(clock: Clock) -> None:
    names = ["a", "b", "c"]
    measured = measure([candidate(name, clock.work(name, [1.0])) for name in names], CPU, Timing(repeats=3, warmup=2))
    assert clock.calls == ["a"] * 2 + ["b"] * 2 + ["c"] * 2 + names * 3
    assert measured.order == tuple(names * 3)
    assert [entry.name for entry in measured.entries] == names and measured.skipped == ()


def test_samples_are_those_after_the_warm_up(clock: Clock) -> None:
    measured = measure([candidate("a", clock.work("a", [9.0, 3.0, 1.0, 2.0]), size=5)], CPU, Timing(repeats=3))
    entry = measured.entries[0]
    assert entry.seconds == (3.0, 1.0, 2.0) and (entry.median, entry.best) == (2.0, 1.0)
    assert entry.facts == {"size": 5, "error": 0.0}


def test_short_work_is_called_more_often_in_a_sample(clock: Clock) -> None:
    disturbed = clock.work("short", [0.25, 1.5, 0.25])
    runs = [candidate("short", disturbed), candidate("long", clock.work("long", [4.0]))]
    short, long = measure(runs, CPU, Timing(repeats=2, sample_seconds=1.0)).entries
    assert (short.calls, long.calls) == (4, 1)
    assert short.seconds == (0.25, 0.25) and long.seconds == (4.0, 4.0)
    assert clock.calls.count("short") == 1 + 3 + 2 * 4


def test_error_is_the_distance_from_the_first_result(clock: Clock) -> None:
    runs = [candidate("a", clock.work("a", [1.0], 2.0)), candidate("b", clock.work("b", [1.0], 2.5))]
    assert [entry.facts["error"] for entry in measure(runs, CPU, Timing(1)).entries] == [0.0, 0.25]
    assert relative_error(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])) == pytest.approx(17**0.5 / 4)


def test_stages_are_kept_apart(clock: Clock) -> None:
    seconds = iter([1.0, 2.0, 3.0])

    def run() -> Staged:
        return Staged({"denoise": next(seconds)}, torch.ones(1))

    assert measure([candidate("a", run)], CPU, Timing(repeats=2)).entries[0].stages == {"denoise": (2.0, 3.0)}


def test_who_cannot_run_is_skipped_with_the_reason(clock: Clock) -> None:
    runs = [
        candidate("a", clock.work("a", [1.0])),
        candidate("b", failing(RuntimeError("no kernel\nand more")), "peer"),
        candidate("c", failing(ConfigError("mm_type", "needs a GPU"))),
    ]
    measured = measure(runs, CPU, Timing(1))
    assert [entry.name for entry in measured.entries] == ["a"]
    assert [(one.name, one.reason) for one in measured.skipped] == [
        ("b", "RuntimeError: no kernel"),
        ("c", "mm_type: needs a GPU"),
    ]


def test_a_fault_of_the_engine_is_not_hidden(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="bug"):
        measure([candidate("a", failing(RuntimeError("bug")))], CPU, Timing(1))
    with pytest.raises(ConfigError, match="nothing is left to measure: a: RuntimeError: bug"):
        measure([candidate("a", failing(RuntimeError("bug")), "peer")], CPU, Timing(1))


@pytest.fixture
def case(clock: Clock) -> Case:
    runs = [
        candidate("torch", clock.work("torch", [9.0, 2.0, 4.0, 3.0]), "baseline"),
        candidate("int8", clock.work("int8", [9.0, 1.0, 2.0, 2.0])),
        candidate("fp8", clock.work("fp8", [9.0, 5.0, 1.0, 4.0])),
        candidate("their|int8", clock.work("their", [9.0, 6.0, 7.0, 5.0]), "peer"),
        candidate("gone", failing(LightX2VError("", "is not installed")), "peer"),
    ]
    measured = measure(runs, CPU, Timing(repeats=3))
    return Case("a case", {"rows": 4}, measured, (Column("s", lambda entry: f"{entry.median:g}"),))


def test_ratios_are_quotients_of_medians(case: Case) -> None:
    found = case.to_json()
    medians = {entry["name"]: statistics.median(entry["seconds"]) for entry in found["entries"]}
    assert medians == {"torch": 3.0, "int8": 2.0, "fp8": 4.0, "their|int8": 6.0}
    assert {entry["name"]: entry["median_s"] for entry in found["entries"]} == medians
    assert {entry["name"]: entry["ratio_to_baseline"] for entry in found["entries"]} == {
        name: seconds / medians[found["baseline"]] for name, seconds in medians.items()
    }
    assert found["peer_over_lightx2v"] == {"their|int8": {"int8": 3.0, "fp8": 1.5}}
    assert found["order"] == ["torch", "int8", "fp8", "their|int8"] * 3
    assert found["skipped"] == [{"name": "gone", "reason": "is not installed"}]


def report_of(case: Case, title: str = "A run") -> Report:
    return Report("linear", ("linear", "--rows", "4"), title, hardware(CPU), {"torch": "1"}, {}, ("a note",), (case,))


def test_text_shows_every_entry_and_who_is_missing(case: Case) -> None:
    lines = report_of(case).text().splitlines()
    assert "a note" in lines and "not measured: gone: is not installed" in lines
    table = [line.split() for line in lines[lines.index("a case") + 1 :]]
    assert table[:3] == [["s", "/", "torch"], ["torch", "3", "1.000"], ["int8", "2", "0.667"]]
    assert ["their|int8", "3.000", "1.500"] in table


def test_markdown_section_is_replaced_and_the_rest_stays(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "docs" / "figures.md"
    write_markdown(path, report_of(case))
    assert path.read_text().count("### A run") == 1 and "their\\|int8" in path.read_text()
    path.write_text(f"# Figures\n\n{path.read_text()}\nLast words.\n")
    write_markdown(path, report_of(case, "Another"))
    fewer = Case(case.title, case.work, Measured(case.measured.entries[:1], (), ()), case.columns)
    write_markdown(path, report_of(fewer))
    text = path.read_text()
    assert text.startswith("# Figures\n") and text.index("A run") < text.index("Last words.") < text.index("Another")
    assert text.count("### ") == 2 and text.count("their\\|int8") == 2
    assert "```bash\nlightx2v bench linear --rows 4\n```" in text


def test_the_command_is_told_without_where_to_report() -> None:
    argv = ["linear", "--rows", "4", "--json", "--markdown", "a.md", "--title=T", "--peers", "diffusers", "--debug"]
    assert report_argv(argv) == ("linear", "--rows", "4", "--peers", "diffusers")


def test_hardware_says_what_is_limited() -> None:
    threads, before = torch.get_num_threads(), cores()
    with limited_threads(1):
        found = hardware(CPU)
        assert (found["threads"], found["cores"]) == (1, 1 if hasattr(os, "sched_getaffinity") else before)
    assert (torch.get_num_threads(), cores()) == (threads, before)
    assert found["cpu"] and found["memory_bytes"] == CPU.total_memory


# The peers


def replace_by_half(model: nn.Module, names: Any) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Sequential(model.get_submodule(name), nn.Identity()))


FAKE = Peer("fake-int8", "halves", ("torch",), replace_by_half)
LAZY = Peer("lazy-int8", "nothing", ("torch",), lambda model, names: None)
ABSENT = Peer("absent-int8", "nothing", ("a_module_that_is_not_there",), replace_by_half)
WHOLE = Peer("whole", "bfloat16", ("torch",), lambda model, names: None, whole_model=True)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Peer] = Registry("--peers")
    for peer in (FAKE, LAZY, ABSENT, WHOLE):
        registry.add(peer.name, peer)
    monkeypatch.setattr(base, "PEERS", registry)


@pytest.mark.usefixtures("peers")
def test_peers_are_chosen_by_name() -> None:
    assert choose(None, "dit") == []
    assert choose("fake-int8-compile,absent-int8", "dit") == [Choice(FAKE, True), Choice(ABSENT, False)]
    assert [choice.name for choice in choose("all", "linear")] == [
        f"{name}{end}" for name in ("fake-int8", "lazy-int8") for end in ("", "-compile")
    ]
    assert [choice.name for choice in choose("all", "dit")][-2:] == ["whole", "whole-compile"]
    with pytest.raises(ConfigError, match=r"unknown peer 'fake-int' - did you mean 'fake-int8'\?"):
        choose("fake-int", "dit")


def test_a_peer_says_why_it_cannot_take_part() -> None:
    for choice, bench, reason in (
        (Choice(ABSENT, False), "dit", r"a_module_that_is_not_there is not installed \(pip install a-module"),
        (Choice(WHOLE, False), "linear", "no linear layer of its own"),
    ):
        with pytest.raises(LightX2VError, match=reason):
            choice.check(bench)
    Choice(FAKE, False).check("linear")


def test_a_peer_that_leaves_layers_as_they_were_is_refused() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    Choice(FAKE, False).quantize(model(), ["0", "1"])
    Choice(WHOLE, False).quantize(model(), ["0", "1"])
    with pytest.raises(LightX2VError, match="leaves 2 of 2 layers unquantized, such as '0'"):
        Choice(LAZY, False).quantize(model(), ["0", "1"])


def test_every_peer_of_the_package_can_be_named() -> None:
    for name in base.PEERS:
        assert base.PEERS[name].name == name and base.PEERS[name].modules


# What there is to compute


@pytest.mark.parametrize(
    ("model", "size", "tokens", "teraflops"),
    [
        ("wan-1.3b", Size(832, 480, 81), 32760, 283.0),
        ("wan-14b", Size(832, 480, 81), 32760, 1678.4),
        ("wan-14b", Size(1280, 720, 81), 75600, 6523.4),
        ("wan-14b-i2v", Size(832, 480, 81), 32760, 1686.4),
        ("wan-14b-i2v", Size(1280, 720, 81), 75600, 6540.5),
    ],
)
def test_flops_of_published_sizes(model: str, size: Size, tokens: int, teraflops: float) -> None:
    """Against figures counted by hand for the same models."""
    assert token_count(size) == tokens
    assert work.forward_flops(work.arch_of(model), tokens) / 1e12 == pytest.approx(teraflops, rel=2e-4)


def test_shapes_by_model_and_by_number() -> None:
    named = read_shapes("wan-1.3b,8x4")
    assert [(shape.n, shape.k) for shape in named] == [(1536, 1536), (8960, 1536), (1536, 8960), (8, 4)]
    assert named[0].label == "wan-1.3b self_attn.q and 7 more" and named[1].label == "wan-1.3b ffn.0"


def test_types_times_libraries() -> None:
    long = "W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm"
    assert expand_libraries(["Default", "int8"], None) == ["Default", "int8"]
    assert expand_libraries(["Default", "int8"], "torch,reference") == ["Default", "int8-torch", "int8-reference"]
    assert expand_libraries([long], "torch_native") == [long.replace("Vllm", "TorchNative-ActVllm")]
    assert {"int8-torch", "int8-reference"} <= set(expand_libraries(["int8"], "all"))


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_shapes, "wan-1.3", r"unknown shape 'wan-1.3' - did you mean 'wan-1.3b'\?"),
        (read_shapes, "0x4", "empty side"),
        (work.arch_of, "wan-14", r"unknown model 'wan-14' - did you mean 'wan-14b'\?"),
        (work.read_types, "int8,fp9", r"unknown mm_type 'fp9' - did you mean 'fp8'\?"),
        (lambda text: expand_libraries(["int8"], text), "tocrh", r"unknown library 'tocrh' - did you mean 'torch'\?"),
        (read_rows, "4,-1", "not a list of row counts"),
        (read_size, "480p", "not a size"),
    ],
)
def test_wrong_words_are_named(read: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_random_weights_depend_on_name_shape_and_seed_alone() -> None:
    def make(name: str, seed: int = 0) -> Tensor:
        return work.random_tensor(name, torch.Size([64, 256]), torch.device("cpu"), seed)

    assert torch.equal(make("a.weight"), make("a.weight"))
    assert not torch.equal(make("a.weight"), make("b.weight"))
    assert not torch.equal(make("a.weight"), make("a.weight", 1))
    assert make("a.weight").float().std().item() == pytest.approx(256**-0.5, rel=0.02)
    norm, bias = (
        work.random_tensor(f"n.{leaf}", torch.Size([64]), torch.device("cpu"), 0) for leaf in ("weight", "bias")
    )
    assert bool((norm == 1).all()) and 0 < bias.abs().max() < 0.2


def test_held_bytes_looks_into_wrapped_tensors() -> None:
    class Wrapped:
        """Claims a shape of 1000, holds 6 bytes, as the tensor classes of quantization libraries do."""

        codes = torch.zeros(2, dtype=torch.int8)
        scale = torch.zeros(1)

        def numel(self) -> int:
            return 1000

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

    class Model(nn.Module):
        def parameters(self, recurse: bool = True) -> Iterator[Any]:
            yield Wrapped()
            yield torch.zeros(3, dtype=torch.bfloat16)

        def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
            yield torch.zeros(5, device="meta")

    assert work.held_bytes(Model()) == 2 + 4 + 6


SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.sh"))


def test_scripts_parse_and_can_be_run() -> None:
    assert {path.stem for path in SCRIPTS} == {"lib", "install_peers", "linear", "dit", "e2e", "h200"}
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert path.stem == "lib" or path.stat().st_mode & 0o100


def test_help_needs_no_torch() -> None:
    code = """
import sys
from lightx2v.bench.cli import build_parser
try:
    build_parser("lightx2v bench").parse_args(["dit", "--help"])
except SystemExit as stop:
    assert stop.code == 0
print(sorted({"torch", "diffusers", "pydantic"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: lightx2v bench dit") and run.stdout.endswith("[]\n")
