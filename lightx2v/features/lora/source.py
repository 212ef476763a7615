"""The tensors of a model with its LoRAs added."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.features.lora.plan import Lora, LoraPlan, Term
from lightx2v.io.lora import Delta, add_delta
from lightx2v.io.source import FileSpan, Source

Values = Mapping[Lora, Mapping[str, Tensor]]
"""Tensors by LoRA and by their name in its file."""


class LoraSource:
    """`source`, to which the LoRAs of `plan` are added in float32: what reads it rounds once, to what it keeps.

    The sums are computed on `device`. `plan` may be exchanged; what is read from then on has the new one.
    """

    def __init__(self, source: Source, plan: LoraPlan, device: torch.device) -> None:
        self.source, self.plan, self.device = source, plan, device

    @property
    def names(self) -> Collection[str]:
        return self.source.names

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """As `Source.read`. Raises CheckpointError when a tensor that a LoRA changes is not among what is read."""
        wanted = {name: self.plan.added[name] for name in (names or ()) if name in self.plan.added}
        if names is None:
            wanted = dict(self.plan.added)
        values = load_terms(term for terms in wanted.values() for term in terms)
        for name, tensor in self.source.read(names):
            terms = wanted.pop(name, ())
            yield name, self._sum(tensor, terms, values) if terms else tensor
        for name, terms in wanted.items():
            raise CheckpointError(
                str(terms[0].lora.path), f"changes '{name}', which the checkpoint of the model does not have"
            )

    def locate(self, name: str) -> FileSpan | None:
        """As `Source.locate`: nowhere, for what a LoRA changes."""
        return None if name in self.plan.added else self.source.locate(name)

    def _sum(self, tensor: Tensor, terms: tuple[Term, ...], values: Values) -> Tensor:
        if not tensor.is_floating_point():
            delta = terms[0].delta
            raise CheckpointError(
                str(terms[0].lora.path), f"'{delta.up.name}' cannot be added to '{delta.target}', which is quantized"
            )
        total = tensor.to(self.device, torch.float32, copy=True)
        for term in terms:
            delta, loaded = term.delta, values[term.lora]
            up = rows_of(term, values).to(self.device, torch.float32)
            down = None if delta.down is None else loaded[delta.down.name].to(self.device, torch.float32)
            add_delta(total[delta.start : delta.stop], up, down, term.scale)
        return total


def load_terms(terms: Iterator[Term]) -> Values:
    """The tensors that `terms` are made of; each file is opened once."""
    deltas: dict[Lora, list[Delta]] = {}
    for term in terms:
        deltas.setdefault(term.lora, []).append(term.delta)
    return {lora: lora.load(of_lora) for lora, of_lora in deltas.items()}


def rows_of(term: Term, values: Values) -> Tensor:
    """The rows of `up` that a term adds."""
    delta = term.delta
    return values[term.lora][delta.up.name][delta.first : delta.first + delta.stop - delta.start]
