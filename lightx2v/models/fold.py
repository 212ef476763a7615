"""Where the multiplier of a linear's input can go into what makes that input, so that it costs nothing at run time.

x' = x * m with m [K] before a linear whose weight was divided by m (smoothing, `quant.around`). A family lists in its
spec what stands before its linears; `fold_multiplier` edits the float tensors, which is exact but for rounding. The
layers are no longer those of the model then: a LoRA for it fits none of them (`io.declared` tells, `Foldable.layers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lightx2v.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Foldable:
    """Linears that share an input, one multiplier for all of them, and the layers that make this input.

    One `*` in the names is the number of the block. Kinds:

    norm        a norm with weight and bias: both are multiplied
    modulation  a linear that makes several vectors of width K, among them those at `shift` and `scale`, for the input
                norm(x) (1 + scale) + shift; they become m shift and m (1 + scale) - 1
    rows        linears whose K rows at `chunk`, counted in chunks of K, make the input channel by channel: values of an
                attention, which mixes tokens but no channels; the rows are multiplied. An attention that quantizes its
                values sees others then, less even ones: its scales are to be found after this
    """

    kind: Literal["norm", "modulation", "rows"]
    consumers: tuple[str, ...]
    producers: tuple[str, ...]
    shift: int = 0
    scale: int = 0
    chunk: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """All that a multiplier goes out of or into."""
        return self.consumers + self.producers

    def at(self, layer: str) -> Foldable | None:
        """The same for the block of `layer`, if it is one of the consumers."""
        for pattern in self.consumers:
            match = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), layer)
            if match is not None:
                consumers, producers = (
                    tuple(name.replace("*", match[1]) for name in names) for names in (self.consumers, self.producers)
                )
                return replace(self, consumers=consumers, producers=producers)
        return None


def foldable(records: Iterable[Foldable], layer: str, tensors: Iterable[str]) -> Foldable | None:
    """The first of a family's records by which a multiplier of `layer` can be folded; None where there is none.

    `tensors` are the names of a model's tensors: some models of a family lack layers that others have.
    """
    there = {name.rpartition(".")[0] for name in tensors}
    found = (record.at(layer) for record in records)
    return next((each for each in found if each is not None and there.issuperset(each.producers)), None)


def conditioned(record: Foldable, multiplier: Tensor) -> Tensor:
    """The multiplier, float32 [K], to fold and to divide the weights by in place of one: a multiple of it.

    A modulation is computed in the compute dtype, and m (1 + scale) - 1 loses digits where it is close to -1: with the
    least m at 1 it loses none. Quantization does not see a factor that all channels have.
    """
    m = multiplier.float()
    return m / m.min() if record.kind == "modulation" else m


def fold_multiplier(tensors: MutableMapping[str, Tensor], record: Foldable, multiplier: Tensor) -> None:
    """Multiply the input of the consumers of `record`, of one block, by `multiplier` [K].

    The float tensors of the producers, by name, are replaced by edited copies in their dtypes. The consumers' weights
    are not touched: they are to be divided by the multiplier. Raises CheckpointError for a modulation without a bias.
    """
    m = multiplier.float()
    factors = {record.chunk: m}
    if record.kind == "modulation":
        factors = {record.shift: m, record.scale: m}
    for producer in record.producers:
        for name in (f"{producer}.weight", f"{producer}.bias"):
            if name in tensors:
                tensors[name] = _multiplied(tensors[name], factors)
        if record.kind != "modulation":
            continue
        if f"{producer}.bias" not in tensors:
            raise CheckpointError(producer, "has no bias to take up a multiplier", do="store the multiplier instead")
        bias, width = tensors[f"{producer}.bias"], len(m)
        edited = bias.float().clone()
        edited[record.scale * width : (record.scale + 1) * width] += (m - 1).to(bias.device)
        tensors[f"{producer}.bias"] = edited.to(bias.dtype)


def _multiplied(tensor: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """A copy of a weight or bias with its chunks of rows multiplied."""
    result = tensor.float().clone()
    for chunk, factor in factors.items():
        rows = result[chunk * len(factor) : (chunk + 1) * len(factor)]
        rows *= factor.to(rows.device).view(-1, *[1] * (tensor.dim() - 1))
    return result.to(tensor.dtype)
