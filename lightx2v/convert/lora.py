"""LoRAs merged into the weights that a conversion reads, slab by slab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightx2v.convert.naming import Layout, Naming
from lightx2v.convert.options import LoraOption
from lightx2v.convert.source import RowReader
from lightx2v.io.lora import Delta, Place, add_delta, read_lora, tensor_names
from lightx2v.io.weights import Checkpoint


@dataclass(frozen=True)
class Patch:
    """What one LoRA adds to one tensor."""

    reader: RowReader
    delta: Delta
    strength: float

    def add(self, values: Tensor, start: int, stop: int) -> None:
        """Add to rows [start, stop) of the tensor, which `values` holds in float32, in place."""
        delta = self.delta
        begin, end = max(start, delta.start), min(stop, delta.stop)
        if begin >= end:
            return
        first = delta.first - delta.start
        up = self.reader.rows(delta.up.name, first + begin, first + end).to(values.device, torch.float32)
        down = None
        if delta.down is not None:
            down = self.reader.rows(delta.down.name).to(values.device, torch.float32)
        add_delta(values[begin - start : end - start], up, down, self.strength * delta.scale)


def read_loras(
    options: Sequence[LoraOption], naming: Naming, shapes: Mapping[str, tuple[int, ...]], match: str, layout: Layout
) -> tuple[dict[str, list[Patch]], list[Checkpoint]]:
    """The patches of each tensor (by original name), in the order of the files, and the files.

    `shapes` has the tensors of the source by original name. `match` is "auto" (names of either layout), "same" (of the
    output, which has `layout`) or "convert" (of the source). Raises CheckpointError as `read_lora` does.
    """
    if not options:
        return {}, []
    layouts: dict[str, tuple[Layout, ...]] = {"same": (layout,), "convert": (naming.source,)}
    names = tensor_names(
        (name, Place(*place))
        for original, shape in shapes.items()
        for layout in layouts.get(match, ("original", "diffusers"))
        for name, place in naming.named(original, shape, layout)
    )
    patches: dict[str, list[Patch]] = {}
    files = []
    for option in options:
        file = read_lora(option.path, names, shapes, option.alpha)
        files.append(file.checkpoint)
        reader = RowReader(file.checkpoint)
        for delta in file.deltas:
            patches.setdefault(delta.target, []).append(Patch(reader, delta, option.strength))
    return patches, files
