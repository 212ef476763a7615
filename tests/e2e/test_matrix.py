"""Every two features together on tiny models of both families, and many at once, against the plain run.

Bit-equal where nothing approximate is on, else within the errors that `lightx2v.plan.matrix` states.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError
from lightx2v.models.spec import FAMILIES
from lightx2v.plan.matrix import AXES, RUNS, Pair, Value, axis_of, pairs, refusal
from tests.e2e.matrix_runs import Recorder, Runs, error, use_stand_ins

VALUES = {value.name: value for axis in AXES for value in axis.values}
COMPILE = VALUES["compile"]
KINDS = {"wan2.1": 1, "flux": 2}
"""Kinds of blocks, each of which is compiled once."""
COMPILATIONS = {"rules": 3, "changing": 2, "fora": 4, "pab": 5}
"""Of each kind: for every set of attention functions, for every shape, and for the parts between those recalled."""
TOGETHER = ("8 bits", "taylorseer", "block", "branch", "compile")


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    return {family: Runs(family, tmp_path_factory.mktemp(family)) for family in RUNS}


@pytest.fixture(params=RUNS)
def runs(request: pytest.FixtureRequest, all_runs: dict[str, Runs]) -> Runs:
    return all_runs[request.param]


@pytest.fixture(scope="module")
def counted() -> Iterator[tuple[Recorder, CompileCounter]]:
    """Graphs on a CPU, and compilation without a compiler, with what they did."""
    with pytest.MonkeyPatch.context() as patched:
        recorder, counter = Recorder(), CompileCounter()
        use_stand_ins(patched, recorder, counter)
        yield recorder, counter


def is_exact(value: Value) -> bool:
    return not value.errors and not value.redefines


def names(pair: Pair) -> str:
    return "-".join(value.name for value in pair)


@pytest.mark.parametrize("quantized", ["int8", "fp8"])
def test_all_together(runs: Runs, quantized: str) -> None:
    """Compiled in earnest, in the dtype of the plain run and in that of production."""
    torch._dynamo.reset()
    values = [VALUES[name] for name in (quantized, *TOGETHER)]
    for dtype in ("float32", "bfloat16"):
        found = runs.run(runs.plan(*values, dtype=dtype))
        wanted = runs.run(runs.plan(merged=True, dtype=dtype))
        assert error(found, wanted) <= sum(value.errors.get(runs.family, 0) for value in values)
        assert error(found, wanted) < error(found, runs.run(runs.plan(dtype=dtype))), "the LoRA is not in it"


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_one_alone(runs: Runs, value: Value, counted: tuple[Recorder, CompileCounter]) -> None:
    """It does something, and what it costs is what is stated: no less than it is, no more than some times of it."""
    recorder, counter = counted
    torch._dynamo.reset()
    before = counter.frame_count, len(recorder.graphs)
    axis = axis_of(value)
    with_cache = (VALUES["taylorseer"],) if axis.only_with == "cache" else ()
    found, wanted = runs.latents(value, *with_cache), runs.latents(*with_cache, merged=axis.name == "lora")
    plan = runs.plans[frozenset(each.name for each in (value, *with_cache)), False]
    loaded = runs.model(plan)
    if value.redefines:
        default = FAMILIES[runs.family].defaults[plan.config.task].solver
        assert torch.equal(found, wanted) == (value.name == default)
    elif is_exact(value):
        assert torch.equal(found, wanted)
    else:
        stated = value.errors[runs.family]
        assert stated / 8 < error(found, wanted) <= stated or (stated < 1e-4 and error(found, wanted) <= stated)
    if axis.name == "cache":
        assert plan.cache is not None and plan.cache.report.recalled
    if axis.name == "offload":
        assert loaded.offloaded is not None and loaded.offloaded.report.units > 0
    if axis.name == "compile":
        assert counter.frame_count == before[0] + KINDS[runs.family]
    if axis.name == "graphs":
        assert [graph.replays for graph in recorder.graphs[before[1] :]] == [7, 7]  # of 8 steps, one a branch


@pytest.mark.parametrize("pair", list(pairs()), ids=names)
def test_every_pair(runs: Runs, pair: Pair, counted: tuple[Recorder, CompileCounter]) -> None:
    if (refused := refusal(runs.family, *pair)) is not None:
        with pytest.raises(ConfigError) as raised:
            runs.plan(*pair)
        assert str(raised.value) == str(refused)
        return
    others = [value for value in pair if value is not COMPILE]
    if COMPILE in pair and (axis_of(others[0]).name == "mm_type" or others[0].name in COMPILATIONS):
        torch._dynamo.reset()  # the others may find what they need compiled
    _, counter = counted
    compiled = counter.frame_count
    found = runs.latents(*pair)
    exact = [value for value in pair if is_exact(value)]
    redefining = [value for value in pair if value.redefines]
    has_lora = any(axis_of(value).name == "lora" for value in pair)
    if exact:
        assert torch.equal(found, runs.latents(*(value for value in pair if value not in exact)))
    else:
        wanted = runs.latents(*redefining, merged=has_lora)
        assert error(found, wanted) <= sum(value.errors.get(runs.family, 0) for value in pair)
        if has_lora:
            assert error(found, wanted) < error(found, runs.latents(*redefining)), "the LoRA is not in it"
    if COMPILE in pair:
        assert counter.frame_count - compiled <= KINDS[runs.family] * COMPILATIONS.get(others[0].name, 1)
        compiled = counter.frame_count
        assert torch.equal(runs.run(runs.plan(*pair)), found)
        assert counter.frame_count == compiled, "a second request compiles nothing"


def test_every_method_of_a_cache_is_in_the_matrix() -> None:
    from lightx2v.features.cache.build import READS

    assert [value.name for axis in AXES if axis.name == "cache" for value in axis.values] == [*READS]
    assert len(VALUES) == sum(len(axis.values) for axis in AXES), "names are told apart"


def test_settings_of_the_matrix_are_settings() -> None:
    for value in VALUES.values():
        load_config(None, dict(value.settings))
