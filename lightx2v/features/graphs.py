"""`graphs: true`: the blocks of a forward recorded as a graph of the device, and replayed without launching kernels.

A graph reads and writes the memory that it was recorded with, so its inputs are copied into tensors of its own. The
first forward of each branch of a request runs as usual: there the blocks remember what they make of the conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightx2v.features.base import Stack
from lightx2v.models.base import Branch, DiT, StepContext, Stream


class Graph(Protocol):
    """A recorded piece of work."""

    def replay(self) -> None: ...


Recorder = Callable[[], AbstractContextManager[Graph]]
"""Records what is done inside; `platform.graph_recorder` gives that of a device."""


class _Recorded:
    """One graph, with the memory that it reads and writes."""

    def __init__(self, inner: Stack, model: DiT, stream: Stream, context: StepContext, record: Recorder) -> None:
        self.moving = tree_map(_copied, _moving(stream, context))
        self.fixed = tree_map(_copied, _fixed(context))
        self.seen = tree_leaves(_fixed(context))
        x, txt, time = self.moving
        rope, prepared, memory = self.fixed
        text, image, latent, pooled = prepared
        own = replace(context.prepared, text=text, image=image, latent=latent, pooled=pooled, memory=memory)
        with record() as self.graph:
            self.out = inner(model, Stream(x, txt), replace(context, time=time, rope=rope, prepared=own))

    def replay(self, stream: Stream, context: StepContext) -> Stream:
        """What the recorded blocks make of `stream`, in memory of its own."""
        _write(self.moving, _moving(stream, context))
        if any(new is not old for new, old in zip(tree_leaves(_fixed(context)), self.seen, strict=True)):
            _write(self.fixed, _fixed(context))
            self.seen = tree_leaves(_fixed(context))
        self.graph.replay()
        return Stream(self.out.x.clone(), None if self.out.txt is None else self.out.txt.clone())


class Graphs:
    """Records the stack of a model, once for each branch, shape and set of attention functions, and replays it.

    One object serves all requests of a model: a request of a shape that is known records nothing.
    """

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.recorded: dict[Hashable, _Recorded] = {}

    def stack(self, inner: Stack) -> Stack:
        """`inner` for one request, recorded and replayed."""
        warm: set[Branch] = set()

        def run(model: DiT, stream: Stream, context: StepContext) -> Stream:
            if context.branch not in warm:
                warm.add(context.branch)
                return inner(model, stream, context)
            key = _key(model, stream, context)
            if key not in self.recorded:
                self.recorded[key] = _Recorded(inner, model, stream, context, self.record)
            return self.recorded[key].replay(stream, context)

        return run


def _moving(stream: Stream, context: StepContext) -> Any:
    """What differs from step to step."""
    return stream.x, stream.txt, context.time


def _fixed(context: StepContext) -> Any:
    """What stays the same for all steps of a request."""
    made = context.prepared
    return context.rope, (made.text, made.image, made.latent, made.pooled), made.memory


def _key(model: DiT, stream: Stream, context: StepContext) -> Hashable:
    leaves = tree_leaves((_moving(stream, context), _fixed(context)))
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))
    functions = tuple(getattr(part.module, part.name) for part in model.attention_parts())
    return context.branch, context.grid, shapes, functions


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _write(into: Any, values: Any) -> None:
    for own, new in zip(tree_leaves(into), tree_leaves(values), strict=True):
        if isinstance(own, Tensor):
            own.copy_(new)
