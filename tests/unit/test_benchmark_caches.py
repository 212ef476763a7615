"""The benchmark of the feature caches, on few steps."""

from __future__ import annotations

import importlib
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightx2v.eval.prompts import draw_prompts

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("caches")


def test_rows_take_turns_and_are_held_against_their_own_plain_run(caches: Any) -> None:
    bench = caches.Bench(["sampling.steps=6"])
    name, settings = caches.cache_methods.taylor(2)
    for row, cache in ((caches.OURS, {}), (name, settings), ("gate", {"cfg_gate": 0.5})):
        bench.add_ours(row, cache)
    peer = caches.cache_peers.taylor(2, 1, lite=False)
    bench.add_peer(peer)
    bench.run(draw_prompts(1))
    plain, ours, gate, their_plain, theirs = bench.rows.values()
    assert [row.plain for row in (ours, gate, theirs)] == [caches.OURS, caches.OURS, caches.THEIRS]
    assert [row.forwards for row in bench.rows.values()] == [[12], [6], [9], [12], [6]]
    assert [bench.share(row) for row in (plain, ours, gate)] == [1, 0.5, 0.75]
    assert bench.share(their_plain) == 1 and bench.share(theirs) == 0.5
    assert their_plain.psnrs[0] > 40 > max(ours.psnrs[0], theirs.psnrs[0]) > 10
    assert all(len(row.speedups) == 1 and row.speedups[0] > 0 for row in (ours, gate, theirs))
    assert not plain.psnrs and plain.right()["all"] <= 1
    at = caches.at(bench, gate, [ours, gate], "forwards"), caches.at(bench, plain, [ours, gate], "forwards")
    assert at == (gate.psnrs, gate.psnrs)
    between = caches.at(bench, theirs, [replace(ours, forwards=[3]), replace(gate, forwards=[9])], "forwards")
    assert between == pytest.approx([(ours.psnrs[0] + gate.psnrs[0]) / 2])
    assert math.isnan(caches.at(bench, ours, [gate], "operations")[0])
    text = caches.report(bench, [(name, settings)], [caches.Comparison("Taylor", (peer,), ((name, settings),))])
    assert f"| {name} | 6.0 | 50% | 2.00x |" in text and "diffusers TaylorSeer, every module" in text
    assert bench.rows[name].to_json()["psnrs"] == ours.psnrs


def test_a_difference_has_the_interval_of_its_pairs(caches: Any) -> None:
    theirs = [50.0, 40.0, 45.0, 30.0]
    assert caches.difference([value + 1 for value in theirs], theirs) == "+1.000 ± 0.000 dB"
    more = [1.0, -1.0, 2.0, 0.0]
    wanted = 2 * float(np.std(more, ddof=1)) / 2
    assert caches.difference(np.add(theirs, more).tolist(), theirs) == f"+0.500 ± {wanted:.3f} dB"


def test_calibration_is_on_other_prompts(caches: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    class Made:
        def write(self, path: Path) -> None: ...

    def calibrate(plan: Any, prompts: list[str]) -> tuple[Any, dict[str, Any]]:
        seen.extend(prompts)
        return Made(), {}

    monkeypatch.setattr(caches, "calibrate_cache", calibrate)
    caches.calibrated(Namespace(prompts=50, seed=0, calibrate=16, set=[]), tmp_path / "made.json")
    assert len(set(seen)) == 16 and not set(seen) & {request.scene.prompt for request in draw_prompts(50)}


def test_what_workers_measure_comes_together_by_row(caches: Any) -> None:
    whole, first, second = (caches.Bench(["sampling.steps=3"]) for _ in range(3))
    for bench in (whole, first, second):
        bench.add_ours(caches.OURS, {})
        bench.add_ours(*caches.cache_methods.taylor(2))
    requests = draw_prompts(2)
    whole.run(requests)
    for bench, request in ((first, requests[0]), (second, requests[1])):
        bench.run([request])
    first.take([row.figures() for row in second.rows.values()])
    for row, wanted in zip(first.rows.values(), whole.rows.values(), strict=True):
        assert (row.psnrs, row.forwards, row.work, row.right()) == (
            *(wanted.psnrs, wanted.forwards, wanted.work),
            wanted.right(),
        )
        assert len(row.seconds) == len(wanted.seconds) == 2
