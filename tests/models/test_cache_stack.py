"""Each method around whole requests: exact where it may not reuse anything, alike for every request, on any stream."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as once
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightx2v.config.features import CacheConfig
from lightx2v.features.base import RunInfo
from lightx2v.features.cache import Cache, Facts, build
from lightx2v.features.cache.adacache import FOR_30_STEPS, AdaCache
from lightx2v.features.cache.dbcache import DBCache
from lightx2v.features.cache.easycache import EasyCache
from lightx2v.features.cache.fbcache import FBCache
from lightx2v.features.cache.fora import Fora
from lightx2v.features.cache.gate import CfgGate
from lightx2v.features.cache.pab import Pab
from lightx2v.features.cache.recall import replaced
from lightx2v.features.cache.store import Holding
from lightx2v.features.cache.taylorseer import TaylorSeer
from lightx2v.features.cache.teacache import TeaCache
from lightx2v.models.base import Branch, Conditions, StepContext, Stream, run_blocks
from tests.models.cache_runs import (
    DoubleDiT,
    Seen,
    double_conditions,
    flux_conditions,
    random_flux,
    run_request,
    trained_wan,
    wan_conditions,
)

STEPS = 12
RATIOS = (1.0,) * STEPS
NOT_REUSING: dict[str, dict[str, Any]] = {
    "teacache": {"threshold": 0.0, "coefficients": (1.0, 0.0)},
    "custom": {"threshold": 0.0, "coefficients": (1.0, 0.0)},
    "magcache": {"threshold": 0.0, "ratios": RATIOS},
    "taylorseer": {"interval": 1},
    "fbcache": {"threshold": 0.0},
    "dbcache": {"threshold": 0.0, "warmup": 0, "last_blocks": 1, "taylor": True},
    "adacache": {"codebook": ((1.0, 1),)},
    "easycache": {"threshold": 0.0, "warmup": 0},
    "fora": {"interval": 1},
    "pab": {"interval": 1},
}
REUSING: dict[str, dict[str, Any]] = {
    "teacache": {"threshold": 0.3, "coefficients": (1.0, 0.0)},
    "custom": {"threshold": 0.3, "coefficients": (1.0, 0.0)},
    "magcache": {"threshold": 0.5, "ratios": RATIOS},
    "taylorseer": {"interval": 3, "order": 2},
    "fbcache": {"threshold": 0.3},
    "dbcache": {"threshold": 0.3, "warmup": 2, "first_blocks": 1, "last_blocks": 1, "taylor": True},
    "adacache": {"motion": True},
    "easycache": {"threshold": 0.3, "warmup": 2},
    "fora": {"interval": 3},
    "pab": {"interval": 2},
}


SHAPES = {"wan": (1, 16, 3, 4, 4), "flux": (1, 16, 1, 8, 8), "double": (1, 8, 2, 4, 4)}
KINDS = tuple(SHAPES)


@once
def model(kind: str) -> Any:
    return {"wan": trained_wan, "flux": random_flux, "double": DoubleDiT}[kind]()


def conditions(kind: str, branches: tuple[Branch, ...]) -> Mapping[Branch, Conditions]:
    if kind == "double":
        return double_conditions(branches=branches)
    return (wan_conditions if kind == "wan" else flux_conditions)(model(kind), branches)


def made(kind: str, method: str, options: Mapping[str, Any], **more: Any) -> Cache:
    facts = Facts.of(model(kind), family="any", task="any", width=8, pixels=4096)
    found = build(CacheConfig(type=method, **options, **more), facts)
    assert found is not None
    return found


def ran(kind: str, cache: Cache | None, branches: tuple[Branch, ...] = ("cond", "uncond"), **more: Any) -> Seen:
    return run_request(model(kind), conditions(kind, branches), SHAPES[kind], cache, steps=STEPS, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", NOT_REUSING)
def test_a_method_that_may_reuse_nothing_changes_no_bit(method: str, kind: str) -> None:
    cache = made(kind, method, NOT_REUSING[method])
    plain, found = ran(kind, None), ran(kind, cache)
    assert torch.equal(found.latents, plain.latents)
    assert cache.report.computed == {"cond": STEPS, "uncond": STEPS} and not cache.report.recalled
    assert found.blocks == plain.blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", REUSING)
def test_a_method_leaves_out_work_and_stays_near(method: str, kind: str) -> None:
    cache = made(kind, method, REUSING[method])
    plain, found = ran(kind, None), ran(kind, cache)
    assert found.latents.isfinite().all()
    error = float((found.latents - plain.latents).norm() / plain.latents.norm())
    assert 0 < error < 0.3
    assert 0 < cache.report.computed_forwards < cache.report.forwards == 2 * STEPS
    assert cache.report.kept_bytes > 0
    assert set(cache.report.computed) == {"cond", "uncond"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", REUSING)
def test_the_second_request_knows_nothing_of_the_first(method: str, kind: str) -> None:
    cache = made(kind, method, REUSING[method])
    ran(kind, cache, seed=1)
    again = ran(kind, cache, seed=2)
    report = cache.report
    fresh = made(kind, method, REUSING[method])
    wanted = ran(kind, fresh, seed=2)
    assert torch.equal(again.latents, wanted.latents)
    assert again.blocks == wanted.blocks and report == fresh.report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", REUSING)
def test_without_guidance_the_one_branch_is_treated_as_with_it(method: str, kind: str) -> None:
    """With a scale of 1 the second branch has no weight, and none in what is decided about the first."""
    cache = made(kind, method, REUSING[method])
    alone = ran(kind, cache, ("cond",))
    assert set(cache.report.computed) == {"cond"}
    both = ran(kind, made(kind, method, REUSING[method]), scales=[1.0] * STEPS)
    assert torch.equal(alone.latents, both.latents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", REUSING)
def test_a_planned_schedule_is_what_happens(method: str, kind: str) -> None:
    cache = made(kind, method, REUSING[method])
    found = ran(kind, cache)
    assert found.run is not None
    planned = cache.schedule(found.run)
    if planned is None:
        assert method in ("fbcache", "dbcache", "adacache", "easycache") or not model(kind).time_signal
        return
    assert planned == {key: key in found.blocks for key in found.run.runs()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", REUSING)
def test_guidance_that_begins_late_and_a_change_of_shape(method: str, kind: str) -> None:
    """Forwards without anything to reuse are computed, and planned so."""
    cache = made(kind, method, REUSING[method])

    def resize(step: int, latents: Tensor) -> Tensor:
        return latents[..., :2] if step == 0 else torch.cat([latents, latents], dim=-1) if step == 7 else latents

    scales = [1.0] * 3 + [2.0] * (STEPS - 3)
    found = ran(kind, cache, scales=scales, restarts=(7,), resize=resize)
    assert found.latents.shape[-1] == 4 and found.latents.isfinite().all()
    assert cache.report.forwards == 2 * STEPS - 3
    blocks = len(model(kind).blocks)
    for key in ((0, "cond"), (3, "uncond"), (7, "cond"), (7, "uncond")):
        assert len(found.blocks[key]) == blocks, key  # type: ignore[index]
    assert found.run is not None
    planned = cache.schedule(found.run)
    assert planned is None or planned == {key: key in found.blocks for key in found.run.runs()}


@pytest.mark.parametrize("method", [name for name in REUSING if name != "easycache"])
def test_fp8_saves_memory_and_costs_little(method: str) -> None:
    plain = ran("wan", None)
    errors = {}
    for store in ("compute", "fp8"):
        cache = made("wan", method, REUSING[method], store=store)
        errors[store] = float((ran("wan", cache).latents - plain.latents).norm() / plain.latents.norm())
    assert cache.report.saved_bytes > 0
    assert errors["fp8"] < errors["compute"] + 0.05


def test_the_measured_decision_is_the_planned_one_around_a_model() -> None:
    """TeaCache on Wan, decided before the loop and forward by forward."""

    class AtRunTime(TeaCache):
        decider = TeaCache.measured

    for ret_steps in (False, True):
        options = {"coefficients": (1.0, 0.0), "threshold": 0.3, "use_ret_steps": ret_steps}
        planned = TeaCache(Holding(), time_signal=True, **options)  # type: ignore[arg-type]
        measured = AtRunTime(Holding(), **options)  # type: ignore[arg-type]
        first, second = ran("wan", planned), ran("wan", measured)
        assert first.blocks == second.blocks and torch.equal(first.latents, second.latents)
        assert 0 < planned.report.computed_forwards < planned.report.forwards


def test_input_dependent_teacache_is_the_published_procedure() -> None:
    """TeaCache4FLUX's decisions, replayed over the signals of the same run."""
    signals: dict[Branch, list[Tensor]] = {"cond": [], "uncond": []}

    class Watched(DoubleDiT):
        def signal(self, stream: Stream, context: StepContext) -> Tensor:
            signals[context.branch].append(super().signal(stream, context))
            return signals[context.branch][-1]

    dit = Watched()
    cache = TeaCache(Holding(), (2.0, 0.1), 0.8)
    found = run_request(dit, double_conditions(), (1, 8, 2, 4, 4), cache, steps=STEPS)
    for branch, seen in signals.items():
        total, wanted = 0.0, []
        for step, signal in enumerate(seen):
            if step in (0, STEPS - 1):
                total, compute = 0.0, True
            else:
                before = seen[step - 1]
                total += 2.0 * float((signal - before).abs().mean() / before.abs().mean()) + 0.1
                compute = total >= 0.8
                total = 0.0 if compute else total
            wanted.append(compute)
        assert wanted == [(step, branch) in found.blocks for step in range(STEPS)]
        assert 1 < sum(wanted) < STEPS


def replay_first_blocks(cache: DBCache, steps: int, branches: tuple[Branch, ...]) -> tuple[Tensor, list[bool]]:
    """FBCache and DBCache by hand on the double-stream model, from the same noise: the latents, and for every forward
    whether it is computed."""
    dit = DoubleDiT()
    last = len(dit.blocks) - cache.last_blocks
    decisions: list[bool] = []
    of_branch: dict[Branch, dict[str, tuple[Tensor, Tensor]]] = {branch: {} for branch in branches}
    computed_by: dict[Branch, list[bool]] = {branch: [] for branch in branches}

    def stack(dit: Any, stream: Stream, context: StepContext) -> Stream:
        kept, computed = of_branch[context.branch], computed_by[context.branch]
        front = run_blocks(dit, stream, context, 0, cache.first_blocks)
        change = front.x - stream.x
        again = [step for step in range(len(computed)) if not computed[step]]
        row = next((n for n, yes in enumerate(reversed(computed)) if yes), len(computed))
        reuse = (
            bool(kept)
            and context.step >= cache.warmup
            and (cache.max_cached is None or len(again) < cache.max_cached)
            and (cache.max_continuous is None or row < cache.max_continuous)
            and float((change - kept["front"][0]).abs().mean() / kept["front"][0].abs().mean()) < cache.threshold
        )
        if not cache.separate and context.branch != branches[0]:
            reuse = not computed_by[branches[0]][context.step]
        computed.append(not reuse)
        decisions.append(not reuse)
        assert front.txt is not None
        if reuse:
            x, txt = kept["middle"]
            out = Stream(front.x + x, front.txt + txt)
        else:
            out = run_blocks(dit, front, context, cache.first_blocks, last)
            assert out.txt is not None
            kept["front"], kept["middle"] = (change, change), (out.x - front.x, out.txt - front.txt)
        return run_blocks(dit, out, context, last)

    class ByHand:
        def begin(self, run: RunInfo, inner: Any) -> Any:
            return stack

        def around(self, run: RunInfo, predict: Any) -> Any:
            return predict

    conditions = double_conditions(branches=branches)
    seen = run_request(dit, conditions, (1, 8, 2, 4, 4), ByHand(), steps=steps)  # type: ignore[arg-type]
    return seen.latents, decisions


@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond")], ids=["cond", "both"])
@pytest.mark.parametrize(
    "cache",
    [
        FBCache(Holding(), 0.15),
        FBCache(Holding(), 0.15, separate=True),
        DBCache(Holding(), 0.2, first_blocks=2, last_blocks=1, warmup=3),
        DBCache(Holding(), 1.0, first_blocks=1, last_blocks=0, warmup=2, max_continuous=2),
        DBCache(Holding(), 1.0, first_blocks=1, last_blocks=2, warmup=0, max_cached=4),
    ],
)
def test_first_block_methods_are_the_published_procedure(cache: DBCache, branches: tuple[Branch, ...]) -> None:
    found = run_request(DoubleDiT(), double_conditions(branches=branches), (1, 8, 2, 4, 4), cache, steps=20)
    wanted, computed = replay_first_blocks(cache, 20, branches)
    blocks = len(DoubleDiT().blocks)
    assert [len(ran) == blocks for ran in found.blocks.values()] == computed
    assert 0 < sum(computed) < len(computed)
    assert {len(ran) for ran in found.blocks.values()} == {blocks, cache.first_blocks + cache.last_blocks}
    assert torch.equal(found.latents, wanted)


def computed_steps(seen: Seen) -> list[list[int]]:
    """The steps that each branch computed."""
    branches: tuple[Branch, ...] = ("cond", "uncond")
    return [[step for (step, name), yes in seen.computed.items() if name == branch and yes] for branch in branches]


@pytest.mark.parametrize(("method", "options"), [("fbcache", {"threshold": 0.2}), ("adacache", {})])
def test_branches_compute_at_the_steps_of_the_first_unless_each_decides(method: str, options: dict[str, Any]) -> None:
    together, separate = (
        ran("wan", made("wan", method, options, cfg_separate=apart), seed=1) for apart in (False, True)
    )
    cond, uncond = computed_steps(separate)
    assert cond != uncond
    cond, uncond = computed_steps(together)
    assert cond == uncond and 1 < len(cond) < STEPS


def test_a_branch_that_begins_late_computes_at_once_and_then_with_the_first() -> None:
    cache = made("wan", "fbcache", {"threshold": 0.5})
    cond, uncond = computed_steps(ran("wan", cache, scales=[1.0] * 4 + [2.0] * (STEPS - 4)))
    assert 4 not in cond
    assert uncond == [4, *(step for step in cond if step > 4)]


def test_adacache_is_the_published_procedure() -> None:
    """STDiT3's compute_next_step, replayed over what the middle block added in a run of the cache itself."""
    steps, middle, added = 24, 2, {}

    class Watching(nn.Module):
        recallable: ClassVar[dict[str, tuple[str, ...]]] = {}

        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block, self.index = block, block.index

        def forward(self, stream: Stream, context: StepContext) -> Stream:
            out: Stream = self.block(stream, context)
            added[context.step] = out.x - stream.x
            return out

    dit = DoubleDiT()
    dit.blocks[middle] = Watching(dit.blocks[middle])
    found = run_request(dit, double_conditions(branches=("cond",)), (1, 8, 2, 4, 4), AdaCache(Holding()), steps=steps)
    computed, rate, previous, due = [], 1, None, 1
    for number in range(1, steps + 1):  # theirs count from 1
        if number != due and number not in (1, steps - 1, steps):
            continue
        computed.append(number - 1)
        residual = added[number - 1]
        if previous is not None:
            change = float((previous - residual).norm(p=1) / previous.norm(p=1)) / rate
            rate = next((length for bound, length in FOR_30_STEPS[:-1] if change < bound), FOR_30_STEPS[-1][1])
        previous, due = residual, number + rate
    assert sorted(step for step, _ in found.blocks) == computed
    assert 3 < len(computed) < steps


def test_motion_makes_adacache_compute_more() -> None:
    """Frames that differ much from each other: 0.385 of their norms is the point from which the change is scaled up."""
    counts = []
    for motion in (False, True):
        cache = AdaCache(Holding(), motion=motion)
        run_request(DoubleDiT(), double_conditions(), (1, 8, 4, 4, 4), cache, steps=30)
        counts.append(cache.report.computed_forwards)
    assert counts[0] < counts[1]


def test_easycache_is_the_published_procedure() -> None:
    """EasyCache4Wan2.1's decisions, replayed around another run of the same model."""
    threshold, warmup, last = 0.3, 3, STEPS - 1
    state: dict[str, Any] = {"total": 0.0, "rate": None, "input": None, "output": None, "at": None}
    kept: dict[Branch, Tensor] = {}
    computed: list[int] = []

    class ByHand:
        def begin(self, run: RunInfo, inner: Any) -> Any:
            return inner

        def around(self, run: RunInfo, predict: Any) -> Any:
            def forward(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
                if branch == "cond":
                    compute = True
                    if warmup <= step < last:
                        moved = (latents - state["input"]).abs().mean()
                        state["total"] += state["rate"] * moved / state["output"].abs().mean()
                        compute = bool(state["total"] >= threshold)
                    if compute:
                        state["total"] = 0.0
                        computed.append(step)
                    state["input"] = latents
                if step not in computed:
                    return latents + kept[branch]
                out = predict(latents, timestep, step, branch)
                kept[branch] = out - latents
                if branch == "cond":
                    if state["output"] is not None:
                        change = (out - state["output"]).abs().mean()
                        state["rate"] = change / (latents - state["at"]).abs().mean()
                    state["output"], state["at"] = out, latents
                return out

            return forward

    wanted = ran("wan", ByHand())  # type: ignore[arg-type]
    cache = EasyCache(threshold, warmup)
    found = ran("wan", cache)
    steps = {branch: [step for step, name in found.blocks if name == branch] for branch in ("cond", "uncond")}
    assert steps["cond"] == steps["uncond"] == computed
    assert 4 < len(computed) < STEPS
    assert torch.equal(found.latents, wanted.latents)


def test_fora_calls_submodules_at_its_steps_only_and_leaves_the_model_as_it_was() -> None:
    dit = DoubleDiT()
    before = [(name, id(module)) for name, module in dit.named_modules()]
    cache = Fora(Holding(), interval=4)
    run_request(dit, double_conditions(), (1, 8, 2, 4, 4), cache, steps=STEPS)
    blocks = len(dit.blocks)
    assert [block.joint.calls for block in dit.blocks] == [2 * 3] * blocks  # type: ignore[union-attr]
    assert cache.report.parts == {"self": (6 * blocks, 18 * blocks), "mlp": (6 * blocks, 18 * blocks)}
    assert cache.report.computed == {"cond": 3, "uncond": 3}
    assert [(name, id(module)) for name, module in dit.named_modules()] == before


def test_pab_recalls_attention_alone() -> None:
    cache = Pab(Holding(), interval=2)
    ran("wan", cache)
    blocks, forwards = len(model("wan").blocks), 2 * STEPS
    assert set(cache.report.parts) == {"self", "cross"}
    assert all(sum(counts) == blocks * forwards for counts in cache.report.parts.values())
    assert cache.report.parts["cross"][1] > cache.report.parts["self"][1] > 0


def test_an_error_in_a_block_leaves_the_model_as_it_was() -> None:
    dit = DoubleDiT()
    before = [id(module) for module in dit.modules()]
    with pytest.raises(RuntimeError, match="inside"), replaced(dit, lambda kind, index, name, module: nn.Identity()):
        assert isinstance(dit.blocks[0].joint, nn.Identity)
        raise RuntimeError("inside")
    assert [id(module) for module in dit.modules()] == before


def test_the_gate_reuses_the_difference_of_the_branches() -> None:
    gate = CfgGate(0.5)
    plain, found = ran("wan", None), ran("wan", gate)
    assert gate.report.computed == {"cond": STEPS, "uncond": STEPS // 2}
    assert gate.report.recalled == {"uncond": STEPS // 2}
    assert [step for step, branch in found.blocks if branch == "uncond"] == list(range(STEPS // 2))
    error = float((found.latents - plain.latents).norm() / plain.latents.norm())
    assert 0 < error < 0.4
    assert torch.equal(ran("wan", CfgGate(1.0)).latents, plain.latents)


@pytest.mark.parametrize("method", REUSING)
def test_the_gate_works_around_every_method(method: str) -> None:
    gate = CfgGate(0.5, made("wan", method, REUSING[method]))
    found = ran("wan", gate)
    assert max(step for step, branch in found.blocks if branch == "uncond") < STEPS // 2
    assert gate.report.forwards == 2 * STEPS and gate.report.recalled["uncond"] >= STEPS // 2
    assert found.latents.isfinite().all() and found.run is not None
    planned = gate.schedule(found.run)
    assert planned is None or planned == {key: key in found.blocks for key in found.run.runs()}


def test_taylor_orders_come_nearer_on_the_trained_model() -> None:
    plain = ran("wan", None).latents
    errors = [float((ran("wan", TaylorSeer(Holding(), 2, order)).latents - plain).norm()) for order in (0, 1)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_lite_taylorseer_leaves_out_whole_forwards_and_keeps_latents_alone(kind: str) -> None:
    lite = made(kind, "taylorseer", {"interval": 2, "lite": True})
    plain, found = ran(kind, None), ran(kind, lite)
    error = float((found.latents - plain.latents).norm() / plain.latents.norm())
    assert found.run is not None and 0 < error < 0.3
    assert lite.schedule(found.run) == {key: key in found.blocks for key in found.run.runs()}
    assert lite.report.computed_forwards == STEPS and lite.report.forwards == 2 * STEPS
    latents = found.latents.numel() * 4
    assert lite.report.kept_bytes == 2 * 2 * latents  # two orders, two branches
    nothing = ran(kind, made(kind, "taylorseer", {"interval": 1, "lite": True}))
    assert torch.equal(nothing.latents, plain.latents)


def test_a_gate_that_opens_again_comes_nearer_on_the_trained_model() -> None:
    plain = ran("wan", None).latents
    gates = CfgGate(0.75), CfgGate(0.5, interval=2)
    errors = [float((ran("wan", gate).latents - plain).norm()) for gate in gates]
    assert gates[0].report.computed == gates[1].report.computed == {"cond": STEPS, "uncond": 9}
    assert errors[1] < errors[0]
