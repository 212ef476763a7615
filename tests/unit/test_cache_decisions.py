"""Which forwards each method computes, against the published procedures written down a second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightx2v.features.base import RunInfo
from lightx2v.features.cache.adacache import FOR_30_STEPS, FOR_100_STEPS
from lightx2v.features.cache.coefficients import Published, lookup, published
from lightx2v.features.cache.facts import Facts
from lightx2v.features.cache.fora import Fora
from lightx2v.features.cache.gate import CfgGate
from lightx2v.features.cache.magcache import MagCache, nearest
from lightx2v.features.cache.pab import Pab
from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.series import Series
from lightx2v.features.cache.stack import Together
from lightx2v.features.cache.store import Holding, Store
from lightx2v.features.cache.taylorseer import TaylorSeer
from lightx2v.features.cache.teacache import TeaCache, polynomial
from lightx2v.models.base import Branch, StepContext, Stream, TimeEmbedding

BOTH: tuple[Branch, ...] = ("cond", "uncond")


def request(steps: int, branches: tuple[Branch, ...] = BOTH, **more: Any) -> RunInfo:
    """A request whose time embedding is random, and the same for both of its parts."""
    generator = torch.Generator().manual_seed(steps)
    time = torch.randn(steps, 6, 16, generator=generator).cumsum(dim=0)
    sigmas = tuple(1 - step / steps for step in range(steps + 1))
    return RunInfo(steps, branches, sigmas, TimeEmbedding(time[:, 0], time), 4, **more)


def computed(schedule: Any, branch: Branch = "cond") -> list[int]:
    return [step for (step, name), yes in schedule.items() if name == branch and yes]


def published_magcache(ratios: Sequence[float], threshold: float, max_skip: int, retention: float) -> list[int]:
    """MagCache4Wan2.1's procedure for one branch: the steps that it computes. The first has nothing to reuse."""
    error, skipped, ratio, steps = 0.0, 0, 1.0, []
    for step, of_step in enumerate(ratios):
        skip = False
        if step >= max(int(len(ratios) * retention), 1):
            ratio *= of_step
            skipped += 1
            error += abs(1 - ratio)
            skip = error < threshold and skipped <= max_skip
            if not skip:
                error, skipped, ratio = 0.0, 0, 1.0
        if not skip:
            steps.append(step)
    return steps


def model(name: str) -> Any:
    return next(known for known in published() if known.name == name)


@pytest.mark.parametrize(
    ("name", "threshold", "max_skip", "count", "steps"),
    [
        ("Wan2.1 I2V 14B 480P", 0.24, 6, 15, 40),
        ("Wan2.1 T2V 1.3B", 0.12, 4, 21, 50),
        ("Wan2.1 T2V 1.3B", 0.24, 6, 18, 50),
        ("HunyuanVideo-1.5 I2V 480P", 0.24, 6, 17, 50),
    ],
)
def test_magcache_computes_as_many_steps_as_lightx2v_with_its_ratios(
    name: str, threshold: float, max_skip: int, count: int, steps: int
) -> None:
    cache = MagCache(Holding(), model(name).ratios, threshold, max_skip, retention=0.2)
    schedule = cache.schedule(request(steps))
    assert len(computed(schedule)) == count
    mean = [sum(of_step) / 2 for of_step in zip(*model(name).ratios.values(), strict=True)]
    wanted = published_magcache(mean, threshold, max_skip, 0.2)
    assert computed(schedule, "cond") == computed(schedule, "uncond") == wanted


def test_magcache_decides_for_each_branch_where_that_is_asked_for() -> None:
    ratios: dict[Branch, list[float]] = {"cond": [1.0] + [0.96] * 19, "uncond": [1.0] + [0.9] * 19}
    schedule = MagCache(Holding(), ratios, 0.2, 5, 0.2, separate=True).schedule(request(20))
    found = {branch: computed(schedule, branch) for branch in BOTH}
    assert found == {branch: published_magcache(ratios[branch], 0.2, 5, 0.2) for branch in BOTH}
    assert found["cond"] != found["uncond"]


@given(
    st.lists(st.floats(0.7, 1.3), min_size=2, max_size=60),
    st.floats(0, 0.5),
    st.integers(1, 8),
    st.floats(0.01, 1),
)
def test_magcache_is_the_published_procedure(
    ratios: list[float], threshold: float, max_skip: int, retention: float
) -> None:
    cache = MagCache(Holding(), {"cond": ratios}, threshold, max_skip, retention)
    wanted = published_magcache(ratios, threshold, max_skip, retention)
    found = computed(cache.schedule(request(len(ratios), ("cond",))))
    assert found == wanted


@given(st.integers(2, 60), st.integers(2, 60))
def test_ratios_for_other_step_counts_are_the_nearest(count: int, steps: int) -> None:
    ratios = np.linspace(1, 2, count)
    scale = (count - 1) / (steps - 1)
    wanted = ratios[np.round(np.arange(steps) * scale).astype(int)]
    assert nearest(tuple(ratios), steps) == tuple(wanted)


def test_a_single_step_takes_the_last_ratio() -> None:
    assert nearest((1.0, 0.9, 0.8), 1) == (0.8,)


def published_teacache(
    signals: torch.Tensor, coefficients: Sequence[float], threshold: float, ret_steps: bool
) -> list[int]:
    """TeaCache4Wan2.1's procedure for one branch: the steps that it computes."""
    count = len(signals)
    first, cutoff = (5, count) if ret_steps else (1, count - 1)
    rescale, total, steps = np.poly1d(coefficients), 0.0, []
    for step in range(count):
        compute = step < first or step >= cutoff
        if not compute:
            before = signals[step - 1]
            total += rescale(float((signals[step] - before).abs().mean() / before.abs().mean()))
            compute = total >= threshold
        if compute:
            total = 0.0
            steps.append(step)
    return steps


@given(
    st.integers(2, 40),
    st.lists(st.floats(-2, 2), min_size=1, max_size=5),
    st.floats(0.001, 2),
    st.booleans(),
)
def test_teacache_is_the_published_procedure_planned_and_at_run_time(
    steps: int, coefficients: list[float], threshold: float, ret_steps: bool
) -> None:
    run = request(steps)
    cache = TeaCache(Holding(), coefficients, threshold, ret_steps, time_signal=True)
    planned = cache.schedule(run)
    signals = run.time.blocks if ret_steps else run.time.head
    wanted = published_teacache(signals, coefficients, threshold, ret_steps)
    assert planned is not None
    assert computed(planned) == computed(planned, "uncond") == wanted

    class Model:
        time_signal = True

    decide = cache.measured(run)
    for step, branch in run.runs():
        context = StepContext(run.time.at(step), (signals, signals), None, (1, 1, 1), step, branch)  # type: ignore[arg-type]
        assert decide(Model(), Stream(signals), context) == planned[step, branch]  # type: ignore[arg-type]


@pytest.mark.parametrize("coefficients", [(-1.0,), (1.0, 0.0)])
def test_teacache_computes_everything_at_threshold_0(coefficients: tuple[float, ...]) -> None:
    cache = TeaCache(Holding(), coefficients, 0.0, time_signal=True)
    assert all((cache.schedule(request(9)) or {"": False}).values())


def test_polynomial_is_numpys() -> None:
    coefficients = model("Wan2.1 T2V 14B").head
    for x in (0.0, 0.03, 0.2, 1.5):
        assert polynomial(coefficients, x) == pytest.approx(float(np.poly1d(coefficients)(x)))


def test_taylorseer_computes_lightx2vs_pattern_and_its_authors() -> None:
    run = request(16)
    assert computed(TaylorSeer(Holding(), interval=4, warmup=1).schedule(run)) == [0, 4, 8, 12]
    # interval 5 after 3 steps that are always computed (cal_type of TaylorSeers-FLUX)
    assert computed(TaylorSeer(Holding(), interval=5, warmup=3).schedule(run)) == [0, 1, 2, 7, 12]
    assert computed(TaylorSeer(Holding(), interval=1, warmup=0).schedule(run)) == list(range(16))


def test_a_branch_that_begins_late_computes_its_first_forward_and_so_does_a_change_of_shape() -> None:
    forwards = tuple((step, branch) for step in range(10) for branch in BOTH if branch == "cond" or step >= 3)
    run = request(10, forwards=forwards, restarts=(6,))
    for cache in (
        TaylorSeer(Holding(), interval=20),
        MagCache(Holding(), {"cond": [1.0] * 10, "uncond": [1.0] * 10}, 1.0, 20, 0.0),
        TeaCache(Holding(), (0.0,), 1.0, time_signal=True),
    ):
        schedule = cache.schedule(run)
        assert schedule is not None and list(schedule) == list(forwards)
        last = [9] if isinstance(cache, TeaCache) else []
        assert computed(schedule) == [0, 6, *last]
        assert computed(schedule, "uncond") == [3, 6, *last]


def test_the_first_branch_of_a_step_decides_and_the_other_reuses_nothing_older() -> None:
    store = Store(Holding(), CacheReport("any"))
    series = {branch: Series(store, branch) for branch in BOTH}
    value = torch.zeros(1), None

    def forwards(together: Together, step: int, branches: Sequence[Branch], decided: bool) -> list[Branch]:
        found = [name for name in branches if together.computes(step, series[name], lambda: decided)]
        for name in found:
            series[name].update(step, value)
        return found

    together = Together()
    assert forwards(together, 0, BOTH, True) == ["cond", "uncond"]
    assert forwards(together, 1, BOTH, False) == []
    assert forwards(together, 2, ("cond",), True) == ["cond"]
    assert forwards(together, 3, BOTH, False) == ["uncond"]  # the first keeps what step 2 gave, this one step 0
    assert forwards(together, 4, BOTH, False) == []
    assert forwards(together, 5, BOTH, True) == ["cond", "uncond"]
    asked = iter((False, True))
    separate = Together(separate=True)
    assert [separate.computes(6, series[name], lambda: next(asked)) for name in BOTH] == [False, True]


def test_fora_and_pab_recall_by_the_step_and_their_blocks_always_run() -> None:
    run = request(12)
    fora = Fora(Holding(), interval=3)
    assert all(fora.schedule(run).values())
    assert [step for step in range(12) if not fora.recalled(run)[step, "cond"]] == [0, 3, 6, 9]
    pab = Pab(Holding(), interval=2, window=(100, 800))
    recalled = {kind: [s for s in range(12) if kind in pab.recalled(run)[s, "uncond"]] for kind in ("self", "cross")}
    # timesteps 1000 (1 - step / 12): steps 3 to 10 lie inside the window
    assert recalled == {"self": [3, 5, 7, 9], "cross": [3, 4, 5, 7, 8, 9, 10]}


def test_the_gate_leaves_out_late_unconditional_forwards() -> None:
    run = request(10)
    gate = CfgGate(0.45)
    schedule = gate.schedule(run)
    assert schedule is not None
    assert computed(schedule) == list(range(10)) and computed(schedule, "uncond") == list(range(5))
    inside = CfgGate(0.45, TaylorSeer(Holding(), interval=3)).schedule(run)
    assert inside is not None
    assert computed(inside) == [0, 3, 6, 9] and computed(inside, "uncond") == [0, 3]


def test_the_gate_opens_again_every_few_steps() -> None:
    schedule = CfgGate(0.4, interval=3).schedule(request(12))
    assert schedule is not None
    assert computed(schedule, "uncond") == [0, 1, 2, 3, 4, 7, 10] and computed(schedule) == list(range(12))


def test_the_gate_computes_the_first_unconditional_forward_of_each_shape() -> None:
    run = request(10, restarts=(7,))
    assert computed(CfgGate(0.0).schedule(run), "uncond") == [0, 7]


def test_codebooks_are_in_order() -> None:
    for codebook in (FOR_30_STEPS, FOR_100_STEPS):
        assert list(codebook) == sorted(codebook) and [n for _, n in codebook] == sorted((n for _, n in codebook))[::-1]


@pytest.mark.parametrize(
    ("family", "task", "width", "blocks", "pixels", "variant", "name"),
    [
        ("wan2.1", "t2v", 1536, 30, 480 * 832, "", "Wan2.1 T2V 1.3B"),
        ("wan2.1", "t2v", 5120, 40, 720 * 1280, "", "Wan2.1 T2V 14B"),
        ("wan2.1", "i2v", 5120, 40, 480 * 832, "", "Wan2.1 I2V 14B 480P"),
        ("wan2.1", "i2v", 5120, 40, 720 * 1280, "", "Wan2.1 I2V 14B 720P"),
        ("flux", "t2i", 3072, 57, 1024 * 1024, "", "FLUX.1 dev"),
        ("flux", "i2i", 3072, 57, 1024 * 1024, "kontext", "FLUX.1 Kontext"),
        ("flux", "t2i", 3072, 57, 1024 * 1024, "schnell", None),
        ("wan2.1", "t2v", 256, 4, 64 * 64, "", None),
    ],
)
def test_a_checkpoint_is_told_by_its_sizes(
    family: str, task: str, width: int, blocks: int, pixels: int, variant: str, name: str | None
) -> None:
    found = lookup(Facts(family, task, width, blocks, pixels, variant))
    assert (found.name if found else None) == name


def test_published_lists_have_a_ratio_for_every_step() -> None:
    lengths = {known.name: {len(ratios) for ratios in known.ratios.values()} for known in published() if known.ratios}
    assert lengths["Wan2.1 I2V 14B 720P"] == {40} and lengths["FLUX.1 dev"] == {28}
    assert all(len(counts) == 1 for counts in lengths.values())
    assert all(ratios[0] == 1 for known in published() for ratios in known.ratios.values())


@pytest.mark.parametrize("known", published(), ids=lambda known: known.name)
def test_every_published_model_is_found_by_its_own_description_and_says_where_it_is_from(known: Published) -> None:
    facts = Facts(
        known.family,
        known.tasks[-1],
        known.width or 1,
        known.blocks or 1,
        known.pixels[0],
        known.variants[0] if known.variants else "",
    )
    assert lookup(facts) is known
    assert known.source and (known.head or known.ratios)
    assert {len(numbers) for numbers in (known.head, known.blocks_signal) if numbers} <= {5}
