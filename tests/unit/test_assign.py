"""Choices of mm_types, against all that there are."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightx2v.calibrate.assign import Option, best_within, cheapest_within, total_cost, total_error
from lightx2v.calibrate.rules import as_rules, layer_bytes
from lightx2v.calibrate.target import Goal
from lightx2v.errors import ConfigError
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import match_rules

COSTS = {"Default": 16.0, "int8": 8.0, "int4": 4.0}
LAYERS = st.lists(st.tuples(st.floats(0.5, 4), st.floats(0.01, 100), st.floats(2, 200)), min_size=1, max_size=6)


def options_of(layers: list[tuple[float, float, float]]) -> dict[str, list[Option]]:
    """Layers by size, error of eight bits, and how many times larger that of four is."""
    return {
        f"layer{number}": [
            Option(name, cost * size, {"Default": 0.0, "int8": error, "int4": error * ratio}[name])
            for name, cost in COSTS.items()
        ]
        for number, (size, error, ratio) in enumerate(layers)
    }


@settings(max_examples=60, deadline=None)
@given(layers=LAYERS, share=st.floats(0.0, 1.1))
def test_choices_are_near_the_best_of_all(layers: list[tuple[float, float, float]], share: float) -> None:
    options = options_of(layers)
    every = [dict(zip(options, one, strict=True)) for one in product(*options.values())]
    step = max(size for size, _, _ in layers) * 12  # one layer's change is how far a greedy choice may be off

    allowed = share * max(total_error(one) for one in every)
    found = cheapest_within(options, allowed)
    assert found is not None and total_error(found) <= allowed
    best = min(total_cost(one) for one in every if total_error(one) <= allowed)
    assert total_cost(found) <= best + step

    budget = share * max(total_cost(one) for one in every)
    within = best_within(options, budget)
    able = [one for one in every if total_cost(one) <= budget]
    assert (within is None) == (not able)
    if within is not None:
        assert total_cost(within) <= budget
        cheaper = [one for one in every if total_cost(one) <= budget - step]
        if cheaper:
            assert total_error(within) <= min(total_error(one) for one in cheaper) + 1e-9


FREE = st.lists(st.tuples(st.floats(1, 16), st.floats(0.01, 100)), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(layers=st.lists(FREE, min_size=1, max_size=4), share=st.floats(0.05, 1.0))
def test_options_need_not_lie_on_a_convex_curve(layers: list[list[tuple[float, float]]], share: float) -> None:
    """Costs and errors of five options at random: some are worse in both, some better only than a mix of others."""
    options = {
        f"layer{number}": [Option(str(index), *pair) for index, pair in enumerate(pairs)]
        for number, pairs in enumerate(layers)
    }
    every = [dict(zip(options, one, strict=True)) for one in product(*options.values())]
    step = max(max(cost for cost, _ in pairs) - min(cost for cost, _ in pairs) for pairs in layers)
    allowed = share * max(total_error(one) for one in every)
    found = cheapest_within(options, allowed)
    able = [one for one in every if total_error(one) <= allowed]
    assert (found is None) == (not able)
    if found is not None:
        assert total_error(found) <= allowed
        assert total_cost(found) <= min(total_cost(one) for one in able) + step + 1e-9


def test_an_option_inside_the_curve_is_taken_where_it_fits() -> None:
    """A price of error alone jumps from 4 bits to 16: 8 bits are on no line between them."""
    options = {"a": [Option("fine", 16, 0.0), Option("middle", 8, 0.7), Option("coarse", 4, 1.0)]}
    found = cheapest_within(options, 0.8)
    assert found is not None and found["a"].mm_type == "middle"
    within = best_within(options, 9)
    assert within is not None and within["a"].mm_type == "middle"


def test_layers_that_matter_keep_their_bits() -> None:
    options = options_of([(1, 1, 10), (1, 1, 1000)])
    found = cheapest_within(options, 15)
    assert found is not None and [found[name].mm_type for name in options] == ["int4", "int8"]


def test_no_choice_where_none_is_exact_enough() -> None:
    options = {"a": [Option("int8", 8, 1.0), Option("int4", 4, 9.0)]}
    assert cheapest_within(options, 0.5) is None and best_within(options, 3) is None


def test_rules_say_the_types_of_layers() -> None:
    types = {f"blocks.{i}.{name}": "int8" for i in range(4) for name in ("q", "k", "ffn.2")}
    types |= {f"blocks.{i}.ffn.2": "Default" for i in range(4)} | {"blocks.2.q": "int4-g64", "blocks.1.ffn.2": "int8"}
    default, rules = as_rules(types)
    assert default == "int8" and [rule.match for rule in rules] == ["blocks.2.q", "blocks.*.ffn.2", "blocks.1.ffn.2"]
    found, unused = match_rules(types, default, rules)
    assert found == types and not unused


@pytest.mark.parametrize(
    ("mm_type", "bytes_per_weight"), [("int8", 1.0), ("int4-g64-asym", 0.5 + 8 / 64), ("nvfp4", 0.5 + 1 / 16)]
)
def test_bytes_of_layers(mm_type: str, bytes_per_weight: float) -> None:
    assert layer_bytes(parse(mm_type), 1024, 1024) == pytest.approx(bytes_per_weight * 2**20, rel=0.005)
    assert layer_bytes(None, 10, 20) == 400


def test_goals() -> None:
    assert Goal.parse("psnr=30") == Goal("psnr", 30) and Goal.parse("memory=8GB") == Goal("memory", 8)
    assert Goal.parse("memory=1.5") == Goal("memory", 1.5) and Goal.parse("speed=33") == Goal("speed", 33)
    assert Goal.parse("speed").kind == "speed"
    for text in ("psnr", "psnr=x", "size=3", "memory=-1", "psnr=nan"):
        with pytest.raises(ConfigError):
            Goal.parse(text)
