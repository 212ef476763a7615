"""The parts of a model, one after the other, each run as often as needed on what calibration requests put into it.

A transformer of this engine is walked block by block, so that one block is in memory. A pipeline of diffusers is one
part: its requests are run anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from lightx2v import foreign, platform
from lightx2v.attention.policy import PolicySwitch
from lightx2v.calibrate.streams import Capture, Mover, Streams
from lightx2v.components import dtype_of
from lightx2v.features.lora.source import LoraSource
from lightx2v.foreign.layers import SENSITIVE
from lightx2v.io.source import CheckpointSource, Source
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.models.base import Stream
from lightx2v.models.fold import Foldable
from lightx2v.plan import Plan
from lightx2v.runner import Runner
from lightx2v.sampling.loop import Progress

OnStep = Callable[[int, int, int], None]
"""Told the step that runs now, how many the request has, and the request's number."""


def unheard(step: int, steps: int, request: int) -> None:
    """An `OnStep` that does nothing."""


@dataclass(frozen=True)
class Part:
    """One part of a model, on the device, with float weights."""

    name: str
    """Of the file that it goes into."""
    prefix: str
    """Before the names of its tensors in the whole model: "blocks.3." or ""."""
    module: nn.Module
    run: Callable[[OnStep], None]
    """Run it on everything that the calibration puts into it."""
    foldable: tuple[Foldable, ...] = ()
    """What may stand before its linears."""
    model: Any = None
    """The transformer that it is a block of; None for a model that is no `DiT`."""


class Walk(Protocol):
    """A model in parts."""

    @property
    def source(self) -> Source: ...

    @property
    def names(self) -> Sequence[str]:
        """Of the parts, in order."""
        ...

    @property
    def prefixes(self) -> Sequence[str]:
        """Of their tensors."""
        ...

    @property
    def layers(self) -> Mapping[str, tuple[int, int]]:
        """(N, K) of the linears that are quantized, by full name."""
        ...

    @property
    def sensitive(self) -> Sequence[str]:
        """Globs of the layers that lose most with few bits."""
        ...

    def prepare(self, prompts: Sequence[str], forwards: int) -> None:
        """Run the requests of `prompts`, as far as that is done once and has not been done."""
        ...

    def parts(self, start: int) -> Iterator[Part]:
        """The parts from number `start` on; each is gone when the next is asked for."""
        ...

    def finish(self) -> None:
        """Give up what was kept on disk."""
        ...


class BlockWalk:
    """A transformer of this engine. `folder` holds the streams between its blocks."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        part, family = plan.components["dit"], plan.family
        self.plan, self.device = plan, torch.device(plan.device.torch_name)
        self.dtype: torch.dtype = getattr(torch, plan.config.dtype)
        plain = CheckpointSource(family.open(part.checkpoint), family.original_name, family.is_unused)
        self.source = LoraSource(plain, plan.loras, self.device)
        with torch.device("meta"):
            model: Any = family.build_dit(plan.files.arch)
        self.model = model.eval()
        names = {id(module): name for name, module in self.model.named_modules()}
        self.blocks = [(names[id(block)], block) for block in self.model.blocks]
        self.names = [f"block_{number}" for number in range(len(self.blocks))]
        self.prefixes = [f"{name}." for name, _ in self.blocks]
        self.layers = {layer.name: (layer.out_features, layer.in_features) for layer in part.layers}
        self.sensitive, self._folder = family.sensitive, folder
        self.streams = Streams(folder)

    def prepare(self, prompts: Sequence[str], forwards: int) -> None:
        """Run requests with seeds of their own, and keep the streams of `forwards` of their forwards."""
        self.streams = Streams(self._folder)
        if self.streams.contexts:
            return
        runner, capture = Runner(self.plan), Capture(self.streams, forwards, len(prompts))
        for number, prompt in enumerate(tqdm(prompts, desc="observe", unit="request")):
            request = replace(self.plan.request, prompt=prompt, seed=self.plan.request.seed + number)
            runner.run(request, quiet=True, feature=capture)
        for name in ("dit", *(part.name for part in self.plan.family.surroundings.parts)):
            runner.components.unload(name)
        platform.trim_memory()
        self.streams.complete()

    def parts(self, start: int) -> Iterator[Part]:
        switch = PolicySwitch(self.model.attention_parts(), self.plan.attention_for(self.plan.request))
        if start and start < len(self.blocks) and not self.streams.is_at(start):
            # An earlier run wrote the part before and was stopped before it had run it to the end.
            self._advance(start - 1, switch)
        for number in range(start, len(self.blocks)):
            name, block = self.blocks[number]
            self._fill(f"{name}.", block)
            run, foldable = self._runs(number, block, switch, None), self.plan.family.foldable
            yield Part(self.names[number], f"{name}.", block, run, foldable, self.model)
            self._advance(number, switch)

    def blocks_run(self) -> Iterator[tuple[Part, Callable[..., Stream]]]:
        """Each part, and a function that runs one forward through it: of its number, with the stream that was kept or
        with another one."""
        switch = PolicySwitch(self.model.attention_parts(), self.plan.attention_for(self.plan.request))
        mover = Mover(self.device)
        for number, part in enumerate(self.parts(0)):

            @torch.inference_mode()
            def one(index: int, stream: Stream | None = None, number: int = number, part: Part = part) -> Stream:
                context = self.streams.contexts[index]
                switch.at(context.step, context.grid)
                entering = self.streams.load(index, number, self.device) if stream is None else stream
                made: Stream = part.module(entering, mover.context(context))
                return made

            yield part, one

    def probes(self, count: int) -> list[int]:
        """The numbers of `count` forwards, or of all, from the whole of what was kept."""
        there = len(self.streams.contexts)
        count = min(count, there)
        return [(2 * number + 1) * there // (2 * count) for number in range(count)]

    def finish(self) -> None:
        self.streams.remove()

    def _advance(self, number: int, switch: PolicySwitch) -> None:
        """Make what enters the next block, and give up this one."""
        name, block = self.blocks[number]
        if next(block.parameters()).is_meta:
            self._fill(f"{name}.", block)
        if number + 1 < len(self.blocks):
            self._runs(number, block, switch, number + 1)(unheard)
        self.streams.forget(number)
        block.to("meta")
        platform.trim_memory()

    def _fill(self, prefix: str, block: nn.Module) -> None:
        of_name = dtype_of(self.model, self.dtype)
        wanted = [name for name in self.source.names if name.startswith(prefix)]
        stream_into(
            block,
            ((name.removeprefix(prefix), tensor) for name, tensor in self.source.read(wanted)),
            device=self.device,
            dtype_of=lambda name: of_name(prefix + name),
            where=str(self.plan.components["dit"].checkpoint),
        )

    def _runs(self, number: int, block: nn.Module, switch: PolicySwitch, into: int | None) -> Callable[[OnStep], None]:
        """Every forward through one block, whose results are kept as what enters block number `into`."""

        @torch.inference_mode()
        def run(on_step: OnStep) -> None:
            mover = Mover(self.device)
            told = zip(self.streams.contexts, self.streams.steps, self.streams.requests, strict=True)
            for index, (context, steps, request) in enumerate(told):
                on_step(context.step, steps, request)
                switch.at(context.step, context.grid)
                out = block(self.streams.load(index, number, self.device), mover.context(context))
                if into is not None:
                    self.streams.save(index, into, out)

        return run


def _progress(on_step: OnStep, request: int, progress: Progress) -> None:
    on_step(progress.step, progress.steps, request)


class PipelineWalk:
    """A transformer or UNet of a pipeline of diffusers, by its name, in one part.

    Of the experts of a pipeline that has several, each sees the steps that it serves.
    """

    def __init__(self, plan: foreign.PipelinePlan, name: str) -> None:
        self.plan, self.device, self.name = plan, torch.device(plan.device.torch_name), name
        component = plan.components[name]
        self.source = CheckpointSource(Checkpoint.open(component.checkpoint), lambda name: name, lambda name: False)
        self.names, self.prefixes, self.sensitive = ["model"], [""], SENSITIVE
        self.layers = {layer.name: (layer.out_features, layer.in_features) for layer in component.layers}
        self.prompts: Sequence[str] = ()

    def prepare(self, prompts: Sequence[str], forwards: int) -> None:
        """Requests are run when the part is: `forwards` does not bound them."""
        self.prompts = prompts

    def parts(self, start: int) -> Iterator[Part]:
        if start:
            return
        runner = foreign.PipelineRunner(self.plan)

        def run(on_step: OnStep) -> None:
            for number, prompt in enumerate(tqdm(self.prompts, desc="observe", unit="request")):
                request = replace(self.plan.request, prompt=prompt, seed=self.plan.request.seed + number)
                on_step(0, request.steps, number)
                runner.run(request, partial(_progress, on_step, number), quiet=True)

        yield Part("model", "", getattr(runner.pipeline, self.name), run)

    def finish(self) -> None:
        pass
