"""Where a feature attaches to the denoising of one request: around the stack of blocks, or around whole forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightx2v.models.base import Branch, DiT, StepContext, Stream, TimeEmbedding

Stack = Callable[[DiT, Stream, StepContext], Stream]
"""What carries the stream through the blocks; `models.base.run_blocks` is the plain one."""

Predict = Callable[[Tensor, Tensor, int, Branch], Tensor]
"""A whole forward: (latents, timestep [1], step index, branch) -> velocity."""

Schedule = Mapping[tuple[int, Branch], bool]
"""For every forward of a request, by (step, branch), whether its blocks are computed."""


@dataclass(frozen=True)
class RunInfo:
    """One request, as it is known before its loop starts."""

    steps: int
    branches: tuple[Branch, ...]
    sigmas: tuple[float, ...]
    """Noise levels of every step and the final 0."""
    time: TimeEmbedding
    """Of all steps."""
    blocks: int
    forwards: tuple[tuple[int, Branch], ...] = ()
    """Every forward of the request in order; empty: each step runs every branch."""
    restarts: tuple[int, ...] = ()
    """Steps at which the latents change their shape: what was kept of steps before them no longer fits."""

    def runs(self) -> tuple[tuple[int, Branch], ...]:
        """Every forward of the request in order, by step and branch."""
        return self.forwards or tuple((step, branch) for step in range(self.steps) for branch in self.branches)


class StackFeature(Protocol):
    """Something that leaves out a part of the work of a request, such as a cache. It keeps nothing between requests."""

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        """The stack for one request, in place of `inner`."""
        ...

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        """The forward for the same request, in place of `predict`: that itself unless the feature skips all of it."""
        ...

    def schedule(self, run: RunInfo) -> Schedule | None:
        """Which forwards compute their blocks, where that is known ahead; None where the data decides."""
        ...
