"""Which candidate each layer gets: the least cost for an error that is allowed, or the least error for a cost.

Every layer has options with a cost and an error, and errors of layers add up. Options are chosen by one price of error
for all layers (Lagrange), the price found by bisection; what room is left is then given to single layers, the most
useful change first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    return _search(options, total_error, total_cost, error)


def best_within(options: Mapping[str, Sequence[Option]], cost: float) -> Choice | None:
    """The least total error with a total cost of at most `cost`; None where no choice is so cheap."""
    return _search(options, total_cost, total_error, cost)


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


Total = Callable[[Choice], float]


def _search(options: Mapping[str, Sequence[Option]], bounded: Total, wanted: Total, limit: float) -> Choice | None:
    """The least `wanted` with `bounded` of at most `limit`: one of both is the error, the other the cost."""
    exact = bounded is total_error
    low, high = 0.0, _top_price(options)
    best = {name: min(all_of, key=_exact_first if exact else _cheap_first) for name, all_of in options.items()}
    if bounded(best) > limit:
        return None
    for _ in range(_STEPS):
        price = (low + high) / 2
        found = _at(options, price)
        fits = bounded(found) <= limit
        if fits:
            best = min(best, found, key=wanted)
        # A higher price of error makes choices exact and dear.
        low, high = (low, price) if fits == exact else (price, high)
    return _fill(options, best, bounded, wanted, limit)


def _exact_first(option: Option) -> tuple[float, float]:
    return option.error, option.cost


def _cheap_first(option: Option) -> tuple[float, float]:
    return option.cost, option.error


def _fill(
    options: Mapping[str, Sequence[Option]], choice: Choice, bounded: Total, wanted: Total, limit: float
) -> Choice:
    """Other options for single layers as long as the limit allows, those that win most for what they use first."""
    choice = dict(choice)
    while True:
        moves, total = [], bounded(choice)
        for name, all_of in options.items():
            for option in all_of:
                one, now = {name: option}, {name: choice[name]}
                if wanted(one) < wanted(now):
                    used = bounded(one) - bounded(now)
                    moves.append(((wanted(now) - wanted(one)) / max(used, 1e-300), used, name, option))
        for _, used, name, option in sorted(moves, key=lambda move: -move[0]):
            if total + used <= limit and bounded({**choice, name: option}) <= limit:
                choice[name] = option
                break
        else:
            return choice
