"""What may stand around the product of any quantized weight [N, K], beside its own tensors in a checkpoint.

input_multiplier   float32 [K]: the input is multiplied with it first; the weight was divided by it (SmoothQuant)
input_rotation     int32 []: each so many channels of the input are rotated (`quant.hadamard`), as the weight was
lowrank_down       [R, K] and
lowrank_up         [N, R]: x down^T up^T of the input itself is added to the result (SVDQuant)
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.quant.hadamard import rotate

AROUND_LEAVES = ("input_multiplier", "input_rotation", "lowrank_down", "lowrank_up")


@dataclass(frozen=True, eq=False)
class Around:
    """The tensors of one layer; what is None is not there."""

    multiplier: Tensor | None = None
    rotation: int = 0
    down: Tensor | None = None
    up: Tensor | None = None

    @property
    def before(self) -> bool:
        """Whether the input is changed before it is quantized."""
        return self.multiplier is not None or self.rotation > 0

    def input(self, x: Tensor) -> Tensor:
        """x [..., K] as the quantized weight wants it, in the dtype of x."""
        if self.multiplier is not None:
            x = (x * self.multiplier).to(x.dtype)
        return rotate(x, self.rotation) if self.rotation else x

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y [M, N], made for this call, with the low-rank branch of the input x [M, K] added in place."""
        if self.down is None or self.up is None:
            return y
        middle = F.linear(x.to(y.dtype), self.down.to(y.dtype))
        return y.addmm_(middle, self.up.to(y.dtype).t())


def take_around(leaves: MutableMapping[str, Tensor], k: int, where: str) -> Around:
    """The tensors of `AROUND_LEAVES` out of `leaves`. Raises CheckpointError, which names `where`."""
    found = {name: leaves.pop(name) for name in AROUND_LEAVES if name in leaves}
    rotation = int(found["input_rotation"]) if "input_rotation" in found else 0
    if rotation < 0 or rotation & (rotation - 1) or (rotation and k % rotation):
        raise CheckpointError(where, f"'input_rotation' is {rotation}", allowed=f"a power of two that divides {k}")
    if ("lowrank_down" in found) != ("lowrank_up" in found):
        raise CheckpointError(where, "one of 'lowrank_down' and 'lowrank_up' is missing", do="convert it again")
    down, up = found.get("lowrank_down"), found.get("lowrank_up")
    if down is not None and up is not None and down.shape[0] != up.shape[1]:
        raise CheckpointError(where, f"'lowrank_down' has {down.shape[0]} ranks, 'lowrank_up' {up.shape[1]}")
    multiplier = found.get("input_multiplier")
    return Around(None if multiplier is None else multiplier.float().reshape(-1), rotation, down, up)


def around_leaves(around: Around) -> dict[str, Tensor]:
    """The tensors that `take_around` took."""
    rotation = torch.tensor(around.rotation, dtype=torch.int32) if around.rotation else None
    found = (around.multiplier, rotation, around.down, around.up)
    return {name: tensor for name, tensor in zip(AROUND_LEAVES, found, strict=True) if tensor is not None}


def fold_around(weight: Tensor, multiplier: Tensor | None, rotation: int) -> Tensor:
    """A float weight [N, K] as it is quantized under a multiplier [K] and a rotation: float32."""
    weight = weight.float()
    if multiplier is not None:
        weight = weight / multiplier
    return rotate(weight, rotation) if rotation else weight


def around_bytes(leaves: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of such tensors by their shapes, floats counted as 16 bits where the layer computes in them."""
    sizes = {name: torch.Size(shape).numel() for name, shape in leaves.items()}
    return sum(size * (2 if name.startswith("lowrank") else 4) for name, size in sizes.items())
