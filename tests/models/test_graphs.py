"""Recorded stacks, with a recorder that notes what was done and does it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightx2v.features.graphs import Graphs
from lightx2v.models.base import Branch, StepContext, Stream, run_blocks, set_attention
from lightx2v.models.wan.dit import WanDiT
from lightx2v.platform import graph_recorder, select_device
from tests.models import tiny_checkpoints as tiny

SHAPE = (1, (2, 4, 4))


class Replayed:
    """Stands for a device's graph: replaying repeats the work on the tensors that it was recorded with."""

    def __init__(self) -> None:
        self.work: Callable[[], object] = lambda: None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


class Recording:
    """Makes graphs, and wraps a stack so that its work can be repeated as a graph would."""

    def __init__(self) -> None:
        self.graphs: list[Replayed] = []
        self.eager = 0

    @contextmanager
    def record(self) -> Iterator[Replayed]:
        self.graphs.append(Replayed())
        yield self.graphs[-1]

    def stack(self, model: WanDiT, stream: Stream, context: StepContext) -> Stream:
        out = run_blocks(model, stream, context)
        if self.graphs and self.graphs[-1].replays == 0:
            self.graphs[-1].work = lambda: out.x.copy_(run_blocks(model, stream, context).x)
        else:
            self.eager += 1
        return out


@torch.no_grad()
def steps(model: WanDiT, seed: int, run: object, branches: tuple[Branch, ...]) -> list[Tensor]:
    """Three steps of one request."""
    made = []
    torch.manual_seed(seed)
    latents, _, conditions = tiny.random_inputs(model.arch, *SHAPE)
    prepared = {branch: model.prepare(conditions) for branch in branches}
    times = model.embed_time(torch.tensor([900.0, 500.0, 100.0]))
    for step in range(3):
        for branch in branches:
            stream, context = model.embed(latents * (step + 1), times.at(step), prepared[branch], branch=branch)
            made.append(run(model, stream, context).x)  # type: ignore[operator]
    return made


@torch.no_grad()
def test_replays_give_the_same_and_a_second_request_records_nothing() -> None:
    model = tiny.tiny_dit("i2v")
    recording = Recording()
    graphs = Graphs(recording.record)
    for seed in (0, 1):
        wanted = steps(model, seed, run_blocks, ("cond", "uncond"))
        found = steps(model, seed, graphs.stack(recording.stack), ("cond", "uncond"))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert len({out.data_ptr() for out in found}) == len(found)
    assert len(recording.graphs) == 2  # one a branch
    assert [graph.replays for graph in recording.graphs] == [4, 4]  # steps 1 and 2 of two requests


@torch.no_grad()
def test_another_shape_or_attention_is_recorded_anew() -> None:
    model = tiny.tiny_dit("t2v")
    recording = Recording()
    graphs = Graphs(recording.record)
    steps(model, 0, graphs.stack(recording.stack), ("cond",))
    assert len(recording.graphs) == 1

    def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        return q * 0 + v.mean(dim=1, keepdim=True)

    set_attention(model, attention)
    wanted = steps(model, 0, run_blocks, ("cond",))
    found = steps(model, 0, graphs.stack(recording.stack), ("cond",))
    assert len(recording.graphs) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_cpu_has_no_graphs() -> None:
    assert graph_recorder(select_device("cpu")) is None
