"""The cheapest choice whose clips reach a PSNR: choices are proposed by prediction, and measured with whole runs.

Let q be -10 log10 of a choice's predicted error. Predicted errors are right but for a factor, as far as that goes, so
that dB are q and an offset; where two measured choices enclose the goal, dB are taken to be linear in q between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loguru import logger

from lightx2v.calibrate.assign import Choice, Option, cheapest_within, total_cost, total_error
from lightx2v.calibrate.clips import Measured

TRIES = 6
"""Choices of several mm_types that are measured at most."""
_NEAR = 0.3
"""dB above the goal that are near enough."""
_DOUBT = 1.0
"""dB that the prediction for one mm_type throughout may be too low."""
_EDGE = 0.1
"""How near to one of two choices around the goal the next one may be, as a share of the way between them."""


@dataclass(frozen=True)
class Try:
    """One choice that was measured."""

    choice: Choice
    predicted: float
    """dB."""
    measured: Measured

    @property
    def quality(self) -> float:
        """-10 log10 of the predicted error."""
        return quality(self.choice)

    @property
    def cost(self) -> float:
        """Of all layers."""
        return total_cost(self.choice)


def quality(choice: Choice) -> float:
    """-10 log10 of the predicted error of a choice; of none, 300."""
    return -10 * math.log10(max(total_error(choice), 1e-30))


class Search:
    """Looks for the cheapest choice among `options` by layer whose measured PSNR, less `margin` errors, is `wanted`.

    Every layer has the same mm_types. `measure` runs the clips of a choice.
    """

    def __init__(
        self,
        options: Mapping[str, Sequence[Option]],
        wanted: float,
        measure: Callable[[Choice], Measured],
        margin: float = 1.0,
    ) -> None:
        self.options, self.wanted, self.margin, self._run = options, wanted, margin, measure
        self.tries: list[Try] = []
        names = [option.mm_type for option in next(iter(options.values()))]
        self.uniform: dict[str, Choice] = {
            name: {layer: next(o for o in each if o.mm_type == name) for layer, each in options.items()}
            for name in names
        }
        self.finest: Choice = {
            layer: min(each, key=lambda option: (option.error, option.cost)) for layer, each in options.items()
        }

    def best(self) -> Try | None:
        """The cheapest that reaches the goal, mixed or one mm_type throughout; None where none does."""
        ranked = sorted(self.uniform.values(), key=quality)
        self._measure(ranked[(len(ranked) - 1) // 2])
        self._mix()
        self._one_type()
        if self._cheapest() is None:
            self._measure(self.finest)
        return self._cheapest()

    def reached(self, one: Try) -> float:
        """dB that other clips of a choice are likely to have."""
        return one.measured.less(self.margin)

    def _mix(self) -> None:
        """Measure choices of several mm_types, each corrected by those before it."""
        mixed: list[Try] = []
        aim = self._aim(self.tries)
        for _ in range(TRIES):
            choice = cheapest_within(self.options, 10 ** (-aim / 10)) or self.finest
            if self._known(choice):
                return
            mixed.append(self._measure(choice))
            if self.wanted <= self.reached(mixed[-1]) < self.wanted + _NEAR:
                return
            aim = self._aim(mixed)

    def _one_type(self) -> None:
        """Measure one mm_type throughout, the cheapest first, where it may reach the goal and would be cheaper."""
        for choice in sorted(self.uniform.values(), key=total_cost):
            best = self._cheapest()
            if best is not None and total_cost(choice) >= best.cost:
                return
            near = self._nearest(choice)
            likely = self.reached(near) + quality(choice) - near.quality
            if not self._known(choice) and likely >= self.wanted - _DOUBT:
                self._measure(choice)

    def _aim(self, tries: Sequence[Try]) -> float:
        """The quality that is likely to reach the goal, by choices that were measured."""
        passed = [one for one in tries if self.reached(one) >= self.wanted]
        high = min(passed, key=lambda one: one.quality, default=None)
        failed = [one for one in tries if self.reached(one) < self.wanted and (not high or one.quality < high.quality)]
        low = max(failed, key=lambda one: one.quality, default=None)
        if low is None or high is None:
            known = low or high
            assert known is not None
            return known.quality + self.wanted - self.reached(known) + _NEAR / 2
        way = self.reached(high) - self.reached(low)
        share = (self.wanted + _NEAR / 2 - self.reached(low)) / way
        return low.quality + min(max(share, _EDGE), 1 - _EDGE) * (high.quality - low.quality)

    def _nearest(self, choice: Choice) -> Try:
        """Of those that were measured."""
        return min(self.tries, key=lambda one: abs(one.quality - quality(choice)))

    def _measure(self, choice: Choice) -> Try:
        measured = self._run(choice)
        predicted = measured.mean  # of the first: there is nothing to predict it by
        if self.tries:
            near = self._nearest(choice)
            predicted = near.measured.mean + quality(choice) - near.quality
        made = Try(choice, predicted, measured)
        self.tries.append(made)
        logger.info(
            "choice {}: predicted {:.2f} dB, measured {:.2f} dB with a standard error of {:.2f} dB",
            len(self.tries), made.predicted, measured.mean, measured.error,
        )  # fmt: skip
        return made

    def _known(self, choice: Choice) -> bool:
        return any(one.choice == choice for one in self.tries)

    def _cheapest(self) -> Try | None:
        passed = [one for one in self.tries if self.reached(one) >= self.wanted]
        return min(passed, key=lambda one: one.cost, default=None)
