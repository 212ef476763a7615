"""Statistics of the inputs of chosen linears while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightx2v.errors import ConfigError
from lightx2v.quant.around import Around
from lightx2v.quant.calibration.observers import InputStatistics


@dataclass(frozen=True)
class Wants:
    """What is kept of each input."""

    bins: int = 0
    gram: bool = False
    rows: int = 0


FOLDS = 4
"""Parts that requests are dealt out to, so that what is found on some can be tried on the others."""

Key = Callable[[int, int], int]
"""From a step and the number of steps to the group of steps that it belongs to."""


class Watch:
    """Statistics by group of layers that share their input, and by group of steps."""

    def __init__(self, groups: Mapping[str, Sequence[str]], wants: Wants, key: Key = lambda step, steps: 0) -> None:
        self.groups, self.wants, self.key = groups, wants, key
        self.now = self.fold = 0
        self.found: dict[str, dict[int, InputStatistics]] = {name: {} for name in groups}
        self._around: Mapping[str, Around] = {}

    def at(self, step: int, steps: int, request: int) -> None:
        """Say which step runs, of which request."""
        self.now, self.fold = self.key(step, steps), request % FOLDS

    @contextmanager
    def attached(self, model: nn.Module, around: Mapping[str, Around] | None = None) -> Iterator[None]:
        """See what goes into the layers of `model`, as what stands `around` them makes it."""
        self._around = around or {}
        handles = [
            model.get_submodule(layers[0]).register_forward_pre_hook(self._hook(name))
            for name, layers in self.groups.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def total(self, name: str) -> InputStatistics:
        """Those of all steps."""
        if not self.found[name]:
            raise ConfigError("prompts", f"no request called layer '{name}'", do="give more prompts or steps")
        first, *others = self.found[name].values()
        made = InputStatistics.from_state(first.state())
        for other in others:
            made.merge(other)
        return made

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            if name in self._around:
                x = self._around[name].input(x.float())
            by_steps = self.found[name]
            if self.now not in by_steps:
                wants = self.wants
                by_steps[self.now] = InputStatistics(
                    x.shape[-1], bins=wants.bins, gram=wants.gram, rows=wants.rows, seed=self.now + 1
                )
            by_steps[self.now].update(x, self.fold)

        return hook


def shared_inputs(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`names` in groups whose layers read the same input, by the first of each."""
    groups: dict[str, tuple[str, ...]] = {}
    left = dict.fromkeys(names)
    for prefix, module in model.named_modules():
        for together in getattr(module, "fused", ()):
            full = [f"{prefix}.{name}".lstrip(".") for name in together]
            if members := tuple(name for name in full if name in left):
                groups[members[0]] = members
                for name in members:
                    del left[name]
    groups |= {name: (name,) for name in left}
    return {name: groups[name] for name in names if name in groups}
