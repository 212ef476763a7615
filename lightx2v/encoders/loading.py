"""From a checkpoint's tensors to an encoder's module: names translated, fused layers split, linears swapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.encoders.keymap import NameMap
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.mm.linear import swap_linears
from lightx2v.mm.select import LayerPlan

Routes = Mapping[str, tuple[str, ...]]
"""File tensor names to module tensor names; () for a tensor that is left out on purpose."""


def component_config(weights: Path) -> dict[str, Any]:
    """The config.json of a component folder in the diffusers layout. Raises CheckpointError when there is none."""
    path = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            str(weights), "the tensors do not have the original names, and there is no config.json beside them"
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(str(path), f"is not JSON: {error}") from error


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    routes: Routes,
    names: NameMap,
    *,
    device: torch.device,
    dtype: torch.dtype,
    dtype_of: Callable[[str], torch.dtype],
    plans: Mapping[str, LayerPlan],
    auto_quant: bool,
    where: str,
) -> None:
    """Swap the planned linears of a meta `module`, then stream the checkpoint into it, one tensor at a time.

    `plans` has original layer names. Raises CheckpointError for tensors that are missing, unknown or of a wrong shape.
    """
    shapes = {name: tensor.shape for name, tensor in module.named_parameters()}
    swapped = _module_plans(plans, names, where)
    _check(routes, shapes, swapped, names, where)
    swap_linears(module, swapped, dtype, auto_quant)
    module.requires_grad_(False)
    stream_into(module, _translated(checkpoint, routes, shapes, where), device=device, dtype_of=dtype_of, where=where)


def _module_plans(plans: Mapping[str, LayerPlan], names: NameMap, where: str) -> dict[str, LayerPlan]:
    result: dict[str, LayerPlan] = {}
    for original, plan in plans.items():
        targets = names.to_module(original)
        if not targets:
            raise CheckpointError(where, f"the plan names a layer '{original}' that this encoder does not have")
        for target in targets if plan.mm_type != "Default" else ():
            result[target] = replace(plan, out_features=plan.out_features // len(targets))
    return result


def _check(
    routes: Routes, shapes: Mapping[str, torch.Size], swapped: Mapping[str, LayerPlan], names: NameMap, where: str
) -> None:
    def layer(name: str) -> str:
        return name.rpartition(".")[0]

    def listed(items: list[str]) -> str:
        return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")

    unknown = [n for n, targets in routes.items() if any(t not in shapes and layer(t) not in swapped for t in targets)]
    if unknown:
        scales = all(name.endswith("_scale") for name in unknown)
        raise CheckpointError(
            where,
            f"tensors without a place in this encoder: {listed(unknown)}",
            do="this file is quantized: name its quantization scheme" if scales else "give this encoder's own weights",
        )
    routed = {target for targets in routes.values() for target in targets}
    missing = [names.to_original(n) or n for n in shapes if n not in routed and layer(n) not in swapped]
    if missing:
        raise CheckpointError(where, f"missing tensors (original names): {listed(missing)}")


def _translated(
    checkpoint: Checkpoint, routes: Routes, shapes: Mapping[str, torch.Size], where: str
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in checkpoint.stream([name for name, targets in routes.items() if targets]):
        targets = routes[name]
        if len(targets) > 1:
            rows = checkpoint.tensors[f"{name.rpartition('.')[0]}.weight"].shape[0]
            yield from zip(targets, split_rows(tensor, rows, len(targets), f"{where}: {name}"), strict=True)
            continue
        # The original keeps a batch axis on the class and position embeddings.
        while targets[0] in shapes and tensor.ndim > len(shapes[targets[0]]) and tensor.shape[0] == 1:
            tensor = tensor[0]
        yield targets[0], tensor


def split_rows(tensor: Tensor, rows: int, parts: int, where: str) -> tuple[Tensor, ...]:
    """Split a tensor of a fused layer of `rows` outputs into `parts` equal layers.

    Weights, biases and per-channel scales have a row per output, block scales a row per 128 outputs, and a scale of the
    whole tensor serves every part. Raises CheckpointError for any other shape, and where a block straddles two layers.
    """
    width = rows // parts
    if tensor.ndim and rows % parts == 0 and tensor.shape[0] == rows:
        return tensor.split(width)
    if tensor.numel() == 1:
        return (tensor,) * parts
    if tensor.shape[0] == -(-rows // 128):
        if rows % parts or width % 128:
            raise CheckpointError(
                where,
                f"blocks of 128 rows straddle the {parts} layers of {rows / parts:g} rows that are fused here",
                do="quantize this layer with a scale per channel",
            )
        return tensor.split(width // 128)
    raise CheckpointError(where, f"shape {tuple(tensor.shape)} does not fit a fused layer of {rows} rows")
