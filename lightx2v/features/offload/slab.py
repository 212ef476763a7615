"""The tensors of some modules in one run of bytes, and back in place bit for bit, with their dtypes and strides."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.errors import ConfigError
from lightx2v.mm.custom import CustomLinear

ALIGNMENT = 256
"""Bytes to which every tensor is aligned: no kernel asks for more."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a slab."""

    name: str
    """Full name of the first place that holds it."""
    homes: tuple[tuple[Any, Any], ...]
    """(container, key) of every place: more than one for tied parameters."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    """Of the memory that it spans, gaps included."""
    parameter: bool

    def view(self, memory: Tensor) -> Tensor:
        """The tensor as it lies in the slab `memory`."""
        flat = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        tensor = flat.as_strided(self.shape, self.stride, flat.storage_offset())
        return nn.Parameter(tensor, requires_grad=False) if self.parameter else tensor

    def blank(self) -> Tensor:
        """One without values, for when it is nowhere in memory."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return nn.Parameter(tensor, requires_grad=False) if self.parameter else tensor


def flat_bytes(tensor: Tensor) -> Tensor:
    """The memory that a strided tensor spans as uint8, in its own storage."""
    flat = tensor.detach().as_strided((_span(tensor),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@dataclass
class Slab:
    """Where each tensor of a unit lies. Modules see the tensors that were bound last.

    A tensor that somebody else has put in a place since then is left there: it is no longer the slab's.
    """

    entries: tuple[Entry, ...]
    nbytes: int
    bound: list[Tensor] = field(repr=False)

    @staticmethod
    def of(modules: Sequence[tuple[str, nn.Module]], without: Collection[nn.Module] = ()) -> Slab:
        """Of all tensors below `modules`, by name, less those below `without` and those on meta.

        Raises ConfigError for a tensor that is no plain strided one.
        """
        found: dict[object, tuple[str, Tensor, list[tuple[Any, Any]]]] = {}
        for name, module in modules:
            for full, container, key in _places(name, module, set(without)):
                tensor = container[key]
                if tensor.is_meta:
                    continue
                _check(full, tensor)
                memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                found.setdefault(memory if tensor.numel() else id(tensor), (full, tensor, []))[2].append(
                    (container, key)
                )
        entries, offset = [], 0
        for full, tensor, homes in found.values():
            nbytes = _span(tensor) * tensor.element_size()
            what = (tensor.dtype, tuple(tensor.shape), tensor.stride(), offset, nbytes)
            entries.append(Entry(full, tuple(homes), *what, isinstance(tensor, nn.Parameter)))
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return Slab(tuple(entries), offset, [tensor for _, tensor, _ in found.values()])

    def pack(self, memory: Tensor) -> None:
        """Copy the bound tensors into `memory`, uint8 [nbytes] of any device."""
        for entry, tensor in zip(self.entries, self.bound, strict=True):
            memory[entry.offset : entry.offset + entry.nbytes].copy_(flat_bytes(tensor))

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors as they lie in `memory`."""
        return [entry.view(memory) for entry in self.entries]

    def blanks(self) -> list[Tensor]:
        """The tensors without values."""
        return [entry.blank() for entry in self.entries]

    def bind(self, tensors: list[Tensor]) -> None:
        """Let the modules see `tensors` in place of those bound before."""
        for entry, old, new in zip(self.entries, self.bound, tensors, strict=True):
            for container, key in entry.homes:
                if container[key] is old:
                    container[key] = new
        self.bound = tensors


def _places(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, Any, Any]]:
    """(full name, container, key) of every tensor below `module`, each module once."""
    if module in seen:
        return
    seen.add(module)
    for container in (module._parameters, module._buffers):
        for key, tensor in container.items():
            if tensor is not None:
                yield f"{name}.{key}", container, key
    if isinstance(module, CustomLinear):
        yield from _inside(f"{name} ({module.extra_repr()})", module.custom, seen)
    for key, child in module.named_children():
        yield from _places(f"{name}.{key}", child, seen)


def _inside(name: str, value: object, seen: set[nn.Module]) -> Iterator[tuple[str, Any, Any]]:
    """The same for an object that is no module: its attributes, and lists and dicts among them."""
    if isinstance(value, nn.Module):
        yield from _places(name, value, seen)
        return
    if isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
        raise ConfigError(
            "offload", f"{name} holds tensors in a tuple, where they cannot be exchanged", do="use a list"
        )
    container = value if isinstance(value, list | dict) else getattr(value, "__dict__", {})
    for key, item in list(enumerate(container) if isinstance(container, list) else container.items()):
        if isinstance(item, Tensor):
            yield f"{name}.{key}", container, key
        elif isinstance(item, list | dict | tuple | nn.Module):
            yield from _inside(f"{name}.{key}", item, seen)


def _check(name: str, tensor: Tensor) -> None:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain:
        kind = type(tensor).__name__ if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")
        raise ConfigError(
            "offload",
            f"the layer of '{name}' keeps its weight as {kind}, which cannot be moved",
            do="take another mm_type",
        )
