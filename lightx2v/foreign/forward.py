"""What is put around the forward of a model for the time of one request, and which step of its loop a forward is in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightx2v.errors import LightX2VError
from lightx2v.models.base import Branch

Forward = Callable[..., Any]
BRANCHES: tuple[Branch, ...] = ("cond", "uncond")


@contextmanager
def wrapped_forward(model: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """`model` runs what `wrap` makes of its forward inside the block, and what it ran before after it."""
    before: Forward | None = model.__dict__.get("forward")
    whole: Any = model
    whole.forward = wrap(model.forward)
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["forward"]
        else:
            whole.forward = before


def twin(module: nn.Module) -> Any:
    """A copy that shares all submodules and tensors, and whose submodules can be exchanged."""
    made: Any = copy.copy(module)
    made._modules = dict(module._modules)
    made.__dict__.pop("forward", None)  # what is wrapped around that of `module` is not the copy's
    return made


class Steps:
    """Counts the steps of a pipeline's loop, which calls `advance` after each, and the forwards within one."""

    def __init__(self, pipeline: Any, wanted: int) -> None:
        self.step = 0
        self._pipeline, self._wanted = pipeline, wanted
        self._calls: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Steps of the loop, once it has begun: schedulers of higher order take more than are asked for."""
        return int(getattr(self._pipeline, "num_timesteps", None) or self._wanted)

    @property
    def levels(self) -> tuple[float, ...]:
        """The timestep of every step, as a share of those of the training, and the final 0."""
        scheduler = self._pipeline.scheduler
        train = scheduler.config.get("num_train_timesteps", 1000)
        return (*(float(timestep) / train for timestep in scheduler.timesteps[-self.total :]), 0.0)

    def advance(self) -> None:
        self.step += 1
        self._calls.clear()

    def branch(self, model: nn.Module) -> Branch:
        """Which forward of `model` in this step begins now: the first, of one or of both branches, or the second."""
        number = self._calls.get(id(model), 0)
        self._calls[id(model)] = number + 1
        if number >= len(BRANCHES):
            raise LightX2VError(
                "cache", "the pipeline runs its model more than twice a step", do="set cache.type to none"
            )
        return BRANCHES[number]
