"""`graphs: true`: the blocks of a forward recorded as a graph of the device, and replayed without launching kernels.

A graph reads and writes the memory that it was recorded with, so its inputs are copied into tensors of its own. The
first forward of each branch of a request runs as usual: there the blocks remember what they make of the conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightx2v.features.base import Stack
from lightx2v.models.base import DiT, StepContext, Stream


class Graph(Protocol):
    """A recorded piece of work."""

    def replay(self) -> None: ...


Recorder = Callable[[], AbstractContextManager[Graph]]
"""Records what is done inside; `platform.graph_recorder` gives that of a device."""


class _Recorded:
    """One graph, with the memory that it reads and writes."""

    def __init__(self, inner: Stack, model: DiT, stream: Stream, context: StepContext, record: Recorder) -> None:
        self.moving, self.fixed = _copied((_moving(stream, context), _fixed(model, context)))
        self.seen = tree_leaves(_fixed(model, context))
        x, txt, time = self.moving
        rope, prepared, memory = self.fixed
        text, image, latent, pooled = prepared
        own = replace(context.prepared, text=text, image=image, latent=latent, pooled=pooled, memory=memory)
        with record() as self.graph:
            self.out = inner(model, Stream(x, txt), replace(context, time=time, rope=rope, prepared=own))

    def replay(self, model: DiT, stream: Stream, context: StepContext) -> Stream:
        """What the recorded blocks make of `stream`, in memory of its own."""
        _write(self.moving, _moving(stream, context))
        fixed = _fixed(model, context)
        if any(new is not old for new, old in zip(tree_leaves(fixed), self.seen, strict=True)):
            _write(self.fixed, fixed)
            self.seen = tree_leaves(fixed)
        self.graph.replay()
        return Stream(self.out.x.clone(), None if self.out.txt is None else self.out.txt.clone())


class Graphs:
    """Records the stack of a model, once for each branch, shape and set of attention functions, and replays it.

    Parts of a stack that a feature runs by themselves are recorded by themselves. One object serves all requests of a
    model: a request of a shape that is known records nothing.
    """

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.recorded: dict[Hashable, _Recorded] = {}
        self._tried: set[Hashable] = set()

    def forget(self) -> None:
        """Record anew: modules of the model were exchanged."""
        self.recorded.clear()
        self._tried.clear()

    def stack(self, inner: Stack) -> Stack:
        """`inner` for one request, recorded and replayed."""
        begun: set[Hashable] = set()

        def run(model: DiT, stream: Stream, context: StepContext) -> Stream:
            first = context.branch, _blocks(model)
            form = _form(model, stream, context)
            # Work of a new form sets up what cannot be set up while it is recorded, such as compiled kernels.
            if first not in begun or form not in self._tried:
                begun.add(first)
                self._tried.add(form)
                return inner(model, stream, context)
            key = form, _shapes((_moving(stream, context), _fixed(model, context)))
            if key not in self.recorded:
                self.recorded[key] = _Recorded(inner, model, stream, context, self.record)
            return self.recorded[key].replay(model, stream, context)

        return run


def _moving(stream: Stream, context: StepContext) -> Any:
    """What differs from step to step."""
    return stream.x, stream.txt, context.time


def _fixed(model: DiT, context: StepContext) -> Any:
    """What stays the same for all steps of a request."""
    made = context.prepared
    memory = {index: made.memory[index] for index in _blocks(model) if index in made.memory}
    return context.rope, (made.text, made.image, made.latent, made.pooled), memory


def _blocks(model: DiT) -> tuple[int, ...]:
    """The numbers of the blocks of a model, or of a part of one."""
    return tuple(cast(Any, block).index for block in model.blocks)


def _form(model: DiT, stream: Stream, context: StepContext) -> Hashable:
    functions = tuple(getattr(part.module, part.name) for part in model.attention_parts())
    return context.branch, context.grid, _blocks(model), functions, _shapes((stream.x, stream.txt))


def _shapes(nest: Any) -> Hashable:
    return tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves(nest) if isinstance(leaf, Tensor))


def _copied(nest: Any) -> Any:
    """`nest` with tensors of its own, in all else like the others: a compiled block would compile anew for the rest."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        with torch.inference_mode(leaf.is_inference()):
            empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            return empty.set_(storages[storage.data_ptr()], leaf.storage_offset(), leaf.size(), leaf.stride())

    return tree_map(copied, nest)


def _write(into: Any, values: Any) -> None:
    for own, new in zip(tree_leaves(into), tree_leaves(values), strict=True):
        if isinstance(own, Tensor):
            own.copy_(new)
