"""A quantized layer as the one float weight that it stands for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.quant.around import take_around
from lightx2v.quant.formats import dequantize_leaves, read_leaves
from lightx2v.quant.hadamard import rotate
from lightx2v.quant.layouts import INPUT_LEAVES
from lightx2v.quant.spec import QSpec


def float_weight(stored: Mapping[str, Tensor], spec: QSpec, n: int, k: int, where: str) -> Tensor:
    """float32 [n, k] of the stored tensors of a layer, what stands around its product included.

    How its input is quantized is left out. Raises CheckpointError, which names `where`.
    """
    leaves = {leaf: tensor for leaf, tensor in stored.items() if leaf not in INPUT_LEAVES}
    around = take_around(leaves, k, where)
    weight = dequantize_leaves(read_leaves(leaves, spec, n, k, where), spec)[:, :k].float()
    if around.rotation:
        weight = rotate(weight, around.rotation)  # the normalized Hadamard matrix is its own inverse
    if around.multiplier is not None:
        weight = weight * around.multiplier
    if around.down is not None and around.up is not None:
        weight = weight + around.up.float() @ around.down.float()
    if weight.shape != (n, k):
        raise CheckpointError(where, f"its weight is {list(weight.shape)}, wanted is {[n, k]}")
    return weight
