"""The parts of a DiT that are read once per request, before its loop: in memory for as long as that takes.

They embed the timesteps and the conditions, and are 1.6 % of the weights of Wan2.1 14B, more beside quantized blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lightx2v.io.source import Source
from lightx2v.io.weights import stream_into
from lightx2v.platform import trim_memory


def once_parts(dit: nn.Module) -> dict[str, nn.Module]:
    """The submodules that the class of `dit` names in `once`, by name; those that this model lacks are left out."""
    names: Sequence[str] = cast(Any, dit).once
    modules = dict(dit.named_modules())
    return {name: modules[name] for name in names if name in modules}


def once_names(dit: nn.Module) -> list[str]:
    """Full names of the parameters of those parts: what the weights of the denoising stage are without."""
    return [f"{part}.{name}" for part, module in once_parts(dit).items() for name, _ in module.named_parameters()]


class OnceParts:
    """Brings those parts in and gives them up: to the host's memory, or on a CPU to the checkpoint they came from.

    `source` is what the model was loaded from, `where` what an error names as that. Without a source, and where a part
    has layers that pack their weights, it stays in the host's memory.
    """

    def __init__(self, dit: nn.Module, source: Source | None, device: torch.device, where: str) -> None:
        self.source, self.device, self.where = source, device, where
        self.parts = once_parts(dit)
        if device.type == "cpu":
            self.parts = {name: part for name, part in self.parts.items() if source and _reloads(name, part, source)}
        self._present = True

    @property
    def nbytes(self) -> int:
        """Bytes that the loop does without."""
        return sum(p.numel() * p.element_size() for part in self.parts.values() for p in part.parameters())

    @contextmanager
    def present(self) -> Iterator[None]:
        """The parts are on the device inside the block, and gone after it."""
        if not self._present:
            self._bring_in()
        self._present = True
        try:
            yield
        finally:
            self._give_up()
            self._present = False

    def _bring_in(self) -> None:
        for name, part in self.parts.items():
            if self.device.type != "cpu":
                part.to(self.device)
                continue
            assert self.source is not None
            prefix = f"{name}."
            dtypes = {leaf: parameter.dtype for leaf, parameter in part.named_parameters()}
            tensors = self.source.read([prefix + leaf for leaf in dtypes])
            stream_into(
                part,
                ((full.removeprefix(prefix), tensor) for full, tensor in tensors),
                device=self.device,
                dtype_of=dtypes.__getitem__,
                where=self.where,
            )

    def _give_up(self) -> None:
        for part in self.parts.values():
            part.to("cpu" if self.device.type != "cpu" else "meta")
        trim_memory()


def _reloads(name: str, part: nn.Module, source: Source) -> bool:
    """Whether `part` is plain parameters that the source has under its own names."""
    there = set(source.names)
    plain = not any(hasattr(module, "load_tensor") for module in part.modules())
    return plain and not list(part.buffers()) and all(f"{name}.{leaf}" in there for leaf, _ in part.named_parameters())
