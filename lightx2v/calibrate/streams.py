"""The streams of tokens that enter a block, one for each forward that is looked at, on disk from block to block.

A run of the whole model gives those that enter the first block, and what its blocks read beside them; then each block
alone makes of the streams those that enter the next one. So no more than a block, and one stream, is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.io.files import whole_file
from lightx2v.io.weights import write_safetensors
from lightx2v.models.base import Branch, DiT, Prepared, StepContext, Stream, TimeEmbedding

_CONTEXTS, _SHARED = "contexts.json", "contexts.safetensors"


class Streams:
    """The files below `folder`: what blocks read, by forward, and the streams before one block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contexts: list[StepContext] = []
        self.steps: list[int] = []
        """Of the request that each forward is from."""
        self.requests: list[int] = []
        """Their numbers."""
        if (folder / _CONTEXTS).is_file():
            self._read()

    def add(self, stream: Stream, context: StepContext, steps: int, request: int) -> None:
        """One more forward, of the request of this number, with what enters its first block."""
        self.save(len(self.contexts), 0, stream)
        self.contexts.append(context)
        self.steps.append(steps)
        self.requests.append(request)

    def save(self, index: int, block: int, stream: Stream) -> None:
        """What enters block number `block` in forward number `index`."""
        tensors = {"x": stream.x} if stream.txt is None else {"x": stream.x, "txt": stream.txt}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(self._file(index, block), tensors, {})

    def load(self, index: int, block: int, device: torch.device) -> Stream:
        """What `save` was given."""
        tensors = load_file(self._file(index, block), str(device))
        return Stream(tensors["x"], tensors.get("txt"))

    def is_at(self, block: int) -> bool:
        """Whether what enters block number `block` is there for every forward."""
        return all(self._file(index, block).is_file() for index in range(len(self.contexts)))

    def forget(self, block: int) -> None:
        """Remove what entered block number `block`, but for the first, with which everything can begin anew."""
        for file in self.folder.glob(f"*_{block}.safetensors") if block else ():
            file.unlink()

    def complete(self) -> None:
        """Say that all forwards are there."""
        places: dict[int, int] = {}
        shared: dict[str, Tensor] = {}

        def place(tensor: Tensor | None) -> int | None:
            if tensor is None:
                return None
            if id(tensor) not in places:
                places[id(tensor)] = len(places)
                shared[str(places[id(tensor)])] = tensor
            return places[id(tensor)]

        told = []
        for context, steps, request in zip(self.contexts, self.steps, self.requests, strict=True):
            prepared = context.prepared
            tensors = (*context.time, *context.rope, prepared.text, prepared.image, prepared.latent, prepared.pooled)
            place_of = [place(tensor) for tensor in tensors]
            told.append([place_of, list(context.grid), context.step, context.branch, steps, request])
        write_safetensors(self.folder / _SHARED, shared, {})
        with whole_file(self.folder / _CONTEXTS, needed=len(told) * 200) as temporary:
            temporary.write_text(json.dumps(told), "utf-8")

    def remove(self) -> None:
        """Give up everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        shared = load_file(self.folder / _SHARED)
        for places, grid, step, branch, steps, request in json.loads((self.folder / _CONTEXTS).read_text("utf-8")):
            head, blocks, cos, sin, text, image, latent, pooled = (
                None if place is None else shared[str(place)] for place in places
            )
            assert text is not None and head is not None and blocks is not None and cos is not None and sin is not None
            prepared = Prepared(text, image, latent, pooled)
            self.contexts.append(
                StepContext(TimeEmbedding(head, blocks), (cos, sin), prepared, tuple(grid), step, branch)
            )
            self.steps.append(steps)
            self.requests.append(request)

    def _file(self, index: int, block: int) -> Path:
        return self.folder / f"{index}_{block}.safetensors"


class Mover:
    """Copies contexts to a device, what they have in common once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        """By identity, with the tensor itself, lest another take its place."""

    def context(self, context: StepContext) -> StepContext:
        """The same on the device, with an empty memory."""
        before = context.prepared
        image, latent, pooled = (
            None if tensor is None else self._tensor(tensor) for tensor in (before.image, before.latent, before.pooled)
        )
        prepared = Prepared(self._tensor(before.text), image, latent, pooled)
        time = TimeEmbedding(*map(self._tensor, context.time))
        cos, sin = map(self._tensor, context.rope)
        return replace(context, time=time, rope=(cos, sin), prepared=prepared)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = tensor, tensor.to(self.device)
        return self._moved[id(tensor)][1]


class Capture:
    """Lets requests run in full, and keeps what enters the first block in some of their forwards.

    `forwards` are shared out evenly among `requests`, and over the steps and branches of each.
    """

    def __init__(self, streams: Streams, forwards: int, requests: int) -> None:
        self.streams, self.forwards, self.requests = streams, forwards, requests
        self._request, self._mover = -1, Mover(torch.device("cpu"))

    def schedule(self, run: RunInfo) -> Schedule | None:
        return None

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        self._request, self._mover = self._request + 1, Mover(torch.device("cpu"))
        wanted = self._chosen(run.runs())

        def stack(model: DiT, stream: Stream, context: StepContext) -> Stream:
            if (context.step, context.branch) in wanted:
                kept = replace(stream, x=stream.x.cpu(), txt=None if stream.txt is None else stream.txt.cpu())
                self.streams.add(kept, self._mover.context(context), run.steps, self._request)
            return inner(model, stream, context)

        return stack

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        return predict

    def _chosen(self, runs: Sequence[tuple[int, Branch]]) -> set[tuple[int, Branch]]:
        """Forwards spread over the steps, their branches in turns: of a prompt more is seen than what guides away."""
        count = self.forwards // self.requests + (self._request < self.forwards % self.requests)
        count = min(max(count, 1), len(runs))
        branches = list(dict.fromkeys(branch for _, branch in runs))
        # Each request begins a little later, so that together they see every part of the way.
        shift = self._request / self.requests
        left = dict(enumerate(runs))
        chosen = set()
        for number in range(count):
            place, turn = int((number + shift) * len(runs) / count), branches[(number + self._request) % len(branches)]
            nearest = min(left, key=lambda one: (left[one][1] != turn, abs(one - place)))
            chosen.add(left.pop(nearest))
        return chosen
