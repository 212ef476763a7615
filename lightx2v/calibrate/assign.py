"""Which candidate each layer gets: the least cost for an error that is allowed, or the least error for a cost.

Every layer has options with a cost and an error, and errors of layers add up. Options are chosen by one price of error
for all layers (Lagrange), the price found by bisection; what room is left is then given to single layers, the most
useful change first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to compute a layer."""

    mm_type: str
    cost: float
    """Bytes, or seconds."""
    error: float
    """Squared error of the model's result."""


Choice = dict[str, Option]
_STEPS = 100


def cheapest_within(options: Mapping[str, Sequence[Option]], error: float) -> Choice | None:
    """The least total cost with a total error of at most `error`; None where no choice has so little."""
    exact = {name: min(all_of, key=lambda option: (option.error, option.cost)) for name, all_of in options.items()}
    if total_error(exact) > error:
        return None
    best, low, high = exact, 0.0, _top_price(options)
    for _ in range(_STEPS):
        price = (low + high) / 2
        found = _at(options, price)
        if total_error(found) <= error:
            best, high = min(best, found, key=total_cost), price
        else:
            low = price
    return _spend(options, best, lambda choice: total_error(choice) <= error)


def best_within(options: Mapping[str, Sequence[Option]], cost: float) -> Choice | None:
    """The least total error with a total cost of at most `cost`; None where no choice is so cheap."""
    cheap = {name: min(all_of, key=lambda option: (option.cost, option.error)) for name, all_of in options.items()}
    if total_cost(cheap) > cost:
        return None
    best, low, high = cheap, 0.0, _top_price(options)
    for _ in range(_STEPS):
        price = (low + high) / 2
        found = _at(options, price)
        if total_cost(found) <= cost:
            best, low = min(best, found, key=total_error), price
        else:
            high = price
    return _improve(options, best, cost)


def total_error(choice: Choice) -> float:
    """Of all layers."""
    return sum(option.error for option in choice.values())


def total_cost(choice: Choice) -> float:
    """Of all layers."""
    return sum(option.cost for option in choice.values())


def _at(options: Mapping[str, Sequence[Option]], price: float) -> Choice:
    return {
        name: min(all_of, key=lambda option: option.cost + price * option.error) for name, all_of in options.items()
    }


def _top_price(options: Mapping[str, Sequence[Option]]) -> float:
    """A price at which every layer takes its least error."""
    top = 1.0
    for all_of in options.values():
        for one in all_of:
            for other in all_of:
                if one.error > other.error:
                    top = max(top, abs(other.cost - one.cost) / (one.error - other.error))
    return 2 * top


def _spend(options: Mapping[str, Sequence[Option]], choice: Choice, fits: object) -> Choice:
    """Cheaper options for single layers as long as the choice `fits`, the most that is saved per error first."""
    assert callable(fits)
    choice = dict(choice)
    while True:
        moves = [
            ((choice[name].cost - option.cost) / max(option.error - choice[name].error, 1e-300), name, option)
            for name, all_of in options.items()
            for option in all_of
            if option.cost < choice[name].cost
        ]
        for _, name, option in sorted(moves, key=lambda move: -move[0]):
            if fits({**choice, name: option}):
                choice[name] = option
                break
        else:
            return choice


def _improve(options: Mapping[str, Sequence[Option]], choice: Choice, cost: float) -> Choice:
    """Better options for single layers as long as the total cost allows, the most useful for its cost first."""
    choice = dict(choice)
    while True:
        moves = [
            ((choice[name].error - option.error) / max(option.cost - choice[name].cost, 1e-300), name, option)
            for name, all_of in options.items()
            for option in all_of
            if option.error < choice[name].error
        ]
        for _, name, option in sorted(moves, key=lambda move: -move[0]):
            if total_cost({**choice, name: option}) <= cost:
                choice[name] = option
                break
        else:
            return choice
