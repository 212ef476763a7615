"""What becomes of a linear of nunchaku's where it is a part, or several, of a layer of the model that was quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.nunchaku_packed import Linear, PackedLayer
from lightx2v.quant.integers import integer_values
from lightx2v.quant.spec import INT4_G64

SHIFT = 0.171875
"""What nunchaku adds to the inputs of layers behind a GELU, which is never less than -0.17."""
_WEIGHT_ONLY = "int4-g64"
_ROWS = ("weight", "weight_scale", "weight_zero", "lowrank_up")


def apart(packed: PackedLayer, parts: int) -> list[Linear]:
    """Equal parts of the rows of a layer. Raises CheckpointError where they end within a tile of 128."""
    step = packed.read().n // parts
    if step % 128:
        raise packed.refuse(f"has {step} rows for each of {parts} projections", "multiples of 128")
    found = []
    for start in range(0, parts * step, step):
        rows = slice(start, start + step)
        linear = packed.read(rows)
        # Scales of nvfp4 are in tiles of 128 rows, one after the other.
        leaves = {leaf: _rows(made, rows) if leaf in _ROWS else made for leaf, made in linear.leaves.items()}
        bias = None if linear.bias is None else _rows(linear.bias, rows)
        found.append(replace(linear, n=step, leaves=leaves, bias=bias))
    return found


def _rows(made: Made, rows: slice) -> Made:
    return made._replace(
        make=lambda given: made.make(given)[rows].contiguous(), shape=(rows.stop - rows.start, *made.shape[1:])
    )


def modulation(linear: Linear, vectors: int) -> Linear:
    """A layer whose rows are the channels of `vectors` vectors in turns, one vector after the other."""
    order = torch.arange(linear.n).view(-1, vectors).t().reshape(-1)

    def ordered(made: Made) -> Made:
        return made._replace(make=lambda given: made.make(given)[order])

    bias = linear.bias
    if bias is not None:
        plain = ordered(bias)

        def without_ones(given: Given) -> Tensor:
            parts = plain.make(given).float().view(vectors, -1).clone()
            parts[1::3] -= 1  # of shift, scale and gate
            return parts.flatten()

        bias = plain._replace(make=without_ones, dtype="F32")
    leaves = {leaf: ordered(made) for leaf, made in linear.leaves.items()}
    return replace(linear, leaves=leaves, bias=bias)


def unshifted(linear: Linear) -> Linear:
    """A layer of shifted inputs as one of the inputs themselves, which stay floats."""
    weight, scale, multiplier, bias = (
        *(linear.leaves[leaf] for leaf in ("weight", "weight_scale", "input_multiplier")),
        linear.bias,
    )

    def moved(given: Given) -> Tensor:
        values = integer_values({"weight": weight.make(given), "weight_scale": scale.make(given)}, INT4_G64)
        shifted = (values.double() @ multiplier.make(given).double() * SHIFT).float()
        return shifted if bias is None else bias.make(given).float() + shifted

    needs = [
        need for made in (weight, scale, multiplier, *((bias,) if bias is not None else ())) for need in made.needs
    ]
    made = Made(tuple(dict.fromkeys(needs)), moved, "F32", (linear.n,))
    return replace(linear, mm_type=_WEIGHT_ONLY, bias=made)


def _joined(
    parts: Sequence[Made], join: Callable[[Sequence[Tensor]], Tensor], shape: tuple[int, ...], dtype: str = ""
) -> Made:
    needs = dict.fromkeys(need for part in parts for need in part.needs)
    return Made(tuple(needs), lambda given: join([part.make(given) for part in parts]), dtype or parts[0].dtype, shape)


def beside(packed: PackedLayer, first: Linear, second: Linear) -> Linear:
    """Two layers of parts of an input, whose results are added, as one whose input stays floats."""
    k = first.k + second.k
    join = _Join(packed, (first, second))
    leaves = {
        "weight": join("weight", _columns, (first.n, k // 2)),
        "weight_scale": join("weight_scale", _columns, (first.n, k // 64)),
        "input_multiplier": join("input_multiplier", _end_to_end, (k,)),
        "lowrank_down": join("lowrank_down", _diagonal, (join.ranks, k)),
        "lowrank_up": join("lowrank_up", _columns, (first.n, join.ranks)),
    }
    return Linear(_WEIGHT_ONLY, first.n, k, leaves, join.bias(_sum, (first.n,)))


def above(packed: PackedLayer, first: Linear, second: Linear) -> Linear:
    """Two layers of the same input as one, the rows of the second below those of the first."""
    n = first.n + second.n
    join = _Join(packed, (first, second))

    def same(parts: Sequence[Tensor]) -> Tensor:
        if not torch.equal(parts[0], parts[1]):
            raise packed.refuse("has a smoothing of its own for each of two layers that are one here", "one for both")
        return parts[0]

    leaves = {
        "weight": join("weight", _end_to_end, (n, first.k // 2)),
        "weight_scale": join("weight_scale", _end_to_end, (n, first.k // 64)),
        "input_multiplier": join("input_multiplier", same, (first.k,)),
        "lowrank_down": join("lowrank_down", _end_to_end, (join.ranks, first.k)),
        "lowrank_up": join("lowrank_up", _diagonal, (n, join.ranks)),
    }
    return Linear(first.mm_type, n, first.k, leaves, join.bias(_end_to_end, (n,)))


class _Join:
    """Puts the tensors of two layers together; `packed` is the one that an error names."""

    def __init__(self, packed: PackedLayer, both: tuple[Linear, Linear]) -> None:
        if any(linear.bias is None or "lowrank_down" not in linear.leaves for linear in both):
            raise packed.refuse("is half of a layer here, and one half lacks its bias or low-rank branch", "both")
        self.both = both
        self.ranks = sum(linear.leaves["lowrank_down"].shape[0] for linear in both)

    def __call__(self, leaf: str, join: Callable[[Sequence[Tensor]], Tensor], shape: tuple[int, ...]) -> Made:
        return _joined([linear.leaves[leaf] for linear in self.both], join, shape)

    def bias(self, join: Callable[[Sequence[Tensor]], Tensor], shape: tuple[int, ...]) -> Made:
        biases = [linear.bias for linear in self.both if linear.bias is not None]
        return _joined(biases, lambda parts: join([part.float() for part in parts]), shape, "F32")


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _columns(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


def _diagonal(parts: Sequence[Tensor]) -> Tensor:
    return torch.block_diag(*parts)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(dim=0)
