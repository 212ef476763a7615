"""Where what is kept between steps lies: in the compute dtype, or in fp8 with a scale for each token."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightx2v.features.cache.report import CacheReport
from lightx2v.quant.numerics import quantize_activation
from lightx2v.quant.spec import FP8_TOKEN


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor [..., D] as it is kept: `values` of its own shape, or fp8 codes [rows, D] and their scales [rows, 1]."""

    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    shape: torch.Size
    plain_bytes: int
    """What it would take without fp8."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def unpack(self) -> Tensor:
        """The tensor, in the dtype that it came in."""
        values = self.values if self.scale is None else self.values.float() * self.scale
        return values.to(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Holding:
    """How tensors are kept: in `dtype` where their own is wider, or as e4m3 codes with amax / 448 of each token."""

    dtype: torch.dtype = torch.float32
    store: Literal["compute", "fp8"] = "compute"

    def pack(self, tensor: Tensor) -> Packed:
        dtype = self.dtype if tensor.element_size() > self.dtype.itemsize else tensor.dtype
        plain = tensor.numel() * dtype.itemsize
        if self.store == "fp8":
            codes, scale = quantize_activation(tensor.flatten(0, -2), FP8_TOKEN)
            return Packed(codes, scale, tensor.dtype, tensor.shape, plain)
        return Packed(tensor.to(dtype), None, tensor.dtype, tensor.shape, plain)


class Store:
    """The tensors that one request keeps, or nests of them, by key."""

    def __init__(self, holding: Holding, report: CacheReport) -> None:
        self._holding, self._report = holding, report
        self._kept: dict[Hashable, Any] = {}
        self._nbytes = self._plain_bytes = 0

    def put(self, key: Hashable, value: Any, measured: bool = False) -> None:
        """Keep `value` in place of what was there. What is `measured` is never kept in fp8, whose error would count."""
        self._account(self._kept.pop(key, None), -1)  # gone before the new one is made
        holding = replace(self._holding, store="compute") if measured else self._holding
        self._kept[key] = tree_map_only(Tensor, holding.pack, value)
        self._account(self._kept[key], 1)
        self._report.kept(self._nbytes, self._plain_bytes)

    def _account(self, value: Any, sign: int) -> None:
        packed = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Packed)]
        self._nbytes += sign * sum(leaf.nbytes for leaf in packed)
        self._plain_bytes += sign * sum(leaf.plain_bytes for leaf in packed)

    def get(self, key: Hashable) -> Any:
        """What was kept. Raises KeyError where nothing was."""
        return tree_map_only(Packed, Packed.unpack, self._kept[key])

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept
