"""The branch seam: for one forward, submodules whose output is a residual branch are wrapped, and recalled or kept.

A block goes on doing the rest: norms, modulation, and the gates of the step it is in. So its weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.features.cache.report import CacheReport
from lightx2v.features.cache.stack import first_forwards
from lightx2v.features.cache.store import Holding, Store
from lightx2v.models.base import Branch, DiT, StepContext, Stream


class Recall(nn.Module):
    """Stands for `module`, and gives what `call` makes of it."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@contextmanager
def replaced(model: DiT, wrap: Callable[[str, int, str, nn.Module], nn.Module | None]) -> Iterator[None]:
    """The submodules that the blocks offer are what `wrap` makes of (kind, block, name, module), inside the block.

    Where it makes None of one, that stays as it is.
    """
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for block in model.blocks:
            offered: Mapping[str, tuple[str, ...]] = getattr(type(block), "recallable", {})
            index: int = block.index  # type: ignore[assignment]
            for kind, name in ((kind, name) for kind, names in offered.items() for name in names):
                module = getattr(block, name)
                if (wrapped := wrap(kind, index, name, module)) is not None:
                    originals.append((block, name, module))
                    setattr(block, name, wrapped)
        yield
    finally:
        for block, name, module in originals:
            setattr(block, name, module)


class BranchCache:
    """Base of the methods that recall parts of blocks. A method says which kinds are recalled at a step."""

    method: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]

    def __init__(self, holding: Holding) -> None:
        self.holding = holding
        self.report = CacheReport(self.method)

    def recalls(self, run: RunInfo, kind: str, step: int) -> bool:
        """Whether `step` recalls what submodules of `kind` gave at an earlier one."""
        raise NotImplementedError

    def recalled(self, run: RunInfo) -> dict[tuple[int, Branch], frozenset[str]]:
        """The kinds that each forward recalls."""
        first = first_forwards(run)
        return {
            (step, branch): frozenset(
                kind for kind in self.kinds if (step, branch) not in first and self.recalls(run, kind, step)
            )
            for step, branch in run.runs()
        }

    def schedule(self, run: RunInfo) -> Schedule:
        """Every forward goes through its blocks."""
        return dict.fromkeys(run.runs(), True)

    def kept_streams(self, blocks: int) -> float:
        return float(blocks * len(self.kinds))

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        return predict

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        self.report = report = CacheReport(self.method)
        store = Store(self.holding, report)
        plan = self.recalled(run)
        nothing: frozenset[str] = frozenset()

        def stack(model: DiT, stream: Stream, context: StepContext) -> Stream:
            step, branch = context.step, context.branch
            recalled, wanted_next = plan[step, branch], plan.get((step + 1, branch), nothing)

            def wrap(kind: str, index: int, name: str, module: nn.Module) -> nn.Module | None:
                key = branch, index, name
                again = kind in recalled
                if again or kind in self.kinds:
                    report.count_part(kind, not again)
                if again:
                    return Recall(module, lambda *args, **kwargs: store.get(key))
                if kind not in wanted_next:
                    return None

                def keep(*args: Any, **kwargs: Any) -> Any:
                    out = module(*args, **kwargs)
                    store.put(key, out)
                    return out

                return Recall(module, keep)

            report.count(branch, not recalled)
            with replaced(model, wrap):
                return inner(model, stream, context)

        return stack
