"""What auto learns from measuring: one interleaved timing per shape, kept on disk, and ties left as they were."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightx2v.mm import measured
from lightx2v.mm.measured import SMALLEST, ranking
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.platform import DeviceInfo, select_device

CPU = select_device("cpu")
INT8 = parse("int8")
N, K = 1024, SMALLEST // 1024


class Sleeper:
    """A library that takes as long as it is told."""

    def __init__(self, seconds: float, fails: bool = False) -> None:
        self.seconds, self.fails, self.calls = seconds, fails, 0

    def prepare(self, scheme: object, leaves: object) -> object:
        return leaves

    def linear(self, scheme: object, x: Tensor, packed: object, bias: object) -> Tensor:
        self.calls += 1
        if self.fails:
            raise RuntimeError("kernel missing")
        time.sleep(self.seconds)
        return x


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Sleeper]:
    made = {"onednn": Sleeper(0.02), "torch_native": Sleeper(0.005), "torchao": Sleeper(0, fails=True)}
    monkeypatch.setattr(measured, "LIBRARIES", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


def table(tmp_path: Path) -> dict[str, dict[str, float]]:
    content: dict[str, dict[str, float]] = json.loads((tmp_path / "lightx2v" / "measured.json").read_text())
    return content


def test_the_fastest_comes_first_and_is_measured_once(libraries: dict[str, Sleeper], tmp_path: Path) -> None:
    first = ranking(INT8, ["onednn", "torch_native", "torchao", "reference"], N, K, CPU)
    assert list(first) == ["torch_native", "onednn", "torchao"] and first["torchao"] == float("inf")
    calls = libraries["onednn"].calls
    assert ranking(INT8, ["onednn", "torch_native", "torchao"], N, K, CPU) == first
    assert libraries["onednn"].calls == calls > 1 and libraries["torchao"].calls == 1
    assert len(table(tmp_path)) == 1


def test_the_usual_order_holds_among_equals(libraries: dict[str, Sleeper]) -> None:
    libraries["torch_native"].seconds = 0.0195
    assert next(iter(ranking(INT8, ["onednn", "torch_native"], N, K, CPU))) == "onednn"


@pytest.mark.parametrize(
    ("names", "n", "device"),
    [
        (["onednn", "reference"], N, CPU),
        (["onednn", "torch_native"], N - 1, CPU),
        (["onednn", "torch_native"], N, replace(CPU, name="of another machine")),
    ],
)
def test_what_is_not_measured(
    names: list[str], n: int, device: DeviceInfo, libraries: dict[str, Sleeper], tmp_path: Path
) -> None:
    assert ranking(INT8, names, n, K, device) == {}
    assert not (tmp_path / "lightx2v").exists() and libraries["onednn"].calls == 0


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_table_is_made_anew(content: str, libraries: dict[str, Sleeper], tmp_path: Path) -> None:
    (tmp_path / "lightx2v").mkdir()
    (tmp_path / "lightx2v" / "measured.json").write_text(content)
    assert ranking(INT8, ["onednn", "torch_native"], N, K, CPU)
    assert len(table(tmp_path)) == 1


def test_the_plan_takes_the_faster_one_and_names_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(*_: Any) -> dict[str, float]:
        return {"torch_native": 0.001, "onednn": 0.0025}

    monkeypatch.setattr("lightx2v.mm.select.ranking", known)
    plan = plan_layer("a", "int8", INT8, N, K, device=CPU, fallback=False)
    assert plan.library == "torch_native"
    assert "second best onednn, measured to take 2.5x as long" in plan.reason
    named = plan_layer("a", "int8-onednn", parse("int8-onednn"), N, K, device=CPU, fallback=False)
    assert named.library == "onednn" and "second" not in named.reason


def test_really_measures_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "ROWS", 8)
    seconds = ranking(INT8, ["onednn", "torch_native"], N, K, CPU)
    assert seconds.keys() == {"onednn", "torch_native"} and all(0 < value < 60 for value in seconds.values())
    assert f"torch {torch.__version__}" in next(iter(table(tmp_path)))
