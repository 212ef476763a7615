"""A better start than the nearest codes: block after block, solved with the inputs that the blocks before it give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lightx2v.integrations.quanto import solve
from lightx2v.models.base import StepContext, Stream
from lightx2v.models.wan.dit import WanDiT
from tools.qat.states import States, embed


def solve_blocks(student: WanDiT, teacher: WanDiT, states: States) -> None:
    """`quanto.solve` for each block of `student`, whose linears of 4 and 2 bits are those of `teacher` quantized."""
    with _without_gradients(student), _without_gradients(teacher):
        streams = {student: embed(student, states), teacher: embed(teacher, states)}
        for index in range(len(student.blocks)):
            inputs = {model.blocks[index]: streams[model] for model in streams}
            solve(student.blocks[index], teacher.blocks[index], partial(_run_by, inputs))
            for model, (stream, context) in streams.items():
                streams[model] = Stream(_run(model.blocks[index], stream, context).x.detach()), context


def _run_by(inputs: Mapping[nn.Module, tuple[Stream, StepContext]], block: nn.Module) -> None:
    _run(block, *inputs[block])


@torch.enable_grad()
def _run(block: nn.Module, stream: Stream, context: StepContext) -> Stream:
    """With gradients enabled, if for no tensor: without them an unquantized feed-forward takes its rows by parts."""
    made: Stream = block(stream, replace(context, prepared=replace(context.prepared, memory={})))
    return made


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
