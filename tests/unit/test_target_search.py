"""The search for the cheapest choice that reaches a PSNR, with models of what clips would measure."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from lightx2v.calibrate.assign import Choice, Option, total_cost, total_error
from lightx2v.calibrate.clips import Measured
from lightx2v.calibrate.search import TRIES, Search

BITS = {"Default": 16.0, "int8": 8.0, "int4": 5.0, "int3": 4.0, "int2": 3.0}
ERRORS = {"Default": 0.0, "int8": 1e-5, "int4": 1e-3, "int3": 5e-3, "int2": 3e-2}


def options_of(layers: int = 40, seed: int = 0) -> dict[str, list[Option]]:
    """Layers that matter more and less."""
    matters = np.exp(np.random.default_rng(seed).normal(size=layers))
    return {
        f"layer{i}": [Option(name, BITS[name], ERRORS[name] * float(matter)) for name in BITS]
        for i, matter in enumerate(matters)
    }


def decibels(choice: Choice, slope: float = 1.0, offset: float = 17.0) -> float:
    return min(offset - slope * 10 * math.log10(max(total_error(choice), 1e-30)), 100.0)


def bits(choice: Choice) -> float:
    return total_cost(choice) / len(choice)


MODELS: list[Callable[[Choice], float]] = [
    decibels,
    lambda choice: decibels(choice, slope=0.7, offset=25.0),
    lambda choice: decibels(choice, slope=1.2, offset=11.0),
    lambda choice: decibels(choice) + math.sin(1000 * bits(choice)),  # clips do not heed predictions to the dB
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wanted", [36.0, 40.0, 46.0])
def test_a_mixed_choice_takes_less_than_any_one_mm_type_that_reaches_the_goal(
    model: Callable[[Choice], float], wanted: float
) -> None:
    search = Search(options_of(), wanted, lambda choice: Measured(model(choice)))
    best = search.best()
    assert best is not None and best.measured.mean == model(best.choice) >= wanted
    able = [bits(choice) for choice in search.uniform.values() if model(choice) >= wanted]
    assert bits(best.choice) < min(able)
    assert best.measured.mean < wanted + 2.5
    assert len(search.tries) <= TRIES + len(BITS)


def test_standard_errors_are_kept_off_the_goal() -> None:
    for margin, least in ((0.0, 40.0), (1.0, 41.5), (2.0, 43.0)):
        best = Search(options_of(), 40.0, lambda choice: Measured(decibels(choice), 1.5), margin).best()
        assert best is not None and least <= best.measured.mean < least + 1


def test_one_mm_type_is_taken_where_it_is_measured_to_be_better_than_predicted() -> None:
    """int3 throughout reaches 0.9 dB more than choices with int3 in part, by which the others are predicted."""

    def measure(choice: Choice) -> Measured:
        types = {option.mm_type for option in choice.values()}
        return Measured(decibels(choice) + (0.9 if types == {"int3"} else 0.0))

    options = options_of()
    wanted = measure(Search(options, 30.0, measure).uniform["int3"]).mean - 0.05
    flat = {layer: [o for o in each if o.mm_type in ("Default", "int8", "int3")] for layer, each in options.items()}
    best = Search(flat, wanted, measure).best()
    assert best is not None and {option.mm_type for option in best.choice.values()} == {"int3"}


def test_the_finest_choice_is_what_is_left() -> None:
    """No prediction comes near, and what nothing reaches is not claimed."""
    search = Search(options_of(), 60.0, lambda choice: Measured(100.0 if not total_error(choice) else 20.0))
    best = search.best()
    assert best is not None and {option.mm_type for option in best.choice.values()} == {"Default"}
    without = {layer: [o for o in each if o.mm_type != "Default"] for layer, each in options_of().items()}
    assert Search(without, 60.0, lambda choice: Measured(20.0)).best() is None


def test_measured_takes_clips_together() -> None:
    measured = Measured.of([40.0, 42.0, 44.0, 46.0])
    assert measured.mean == 43 and measured.error == pytest.approx(np.std([40, 42, 44, 46], ddof=1) / 2)
    assert measured.less(2) == measured.mean - 2 * measured.error
    assert Measured.of([40.0]) == Measured(40.0)
