"""Tiny DiTs from a file, whole in memory or offloaded, for comparing the two."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.config.features import OffloadConfig
from lightx2v.features.offload.attach import Offloaded
from lightx2v.features.offload.load import load_offloaded
from lightx2v.io.source import CheckpointSource
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.mm.fused import fuse_projections
from lightx2v.mm.linear import swap_linears
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.models.base import Conditions
from lightx2v.models.wan.dit import WanDiT
from lightx2v.models.wan.spec import WAN
from lightx2v.platform import DeviceInfo, select_device
from tests.models import tiny_checkpoints as tiny

CPU = select_device("cpu")
DTYPE = torch.bfloat16
LAYERS = 5
Inputs = tuple[Tensor, Tensor, Conditions]


def write(folder: Path, task: str = "t2v", layers: int = LAYERS) -> Path:
    """A DiT of `layers` blocks with random weights in bfloat16, in the original layout; returns its file."""
    dit = tiny.cast_dit(tiny.tiny_dit(task, num_layers=layers), DTYPE)
    tiny.write_dit(dit.to(DTYPE), folder, "original")
    return folder / "diffusion_pytorch_model.safetensors"


def source_of(file: Path) -> CheckpointSource:
    return CheckpointSource(Checkpoint.open(file), WAN.original_name, WAN.is_unused)


def inputs_of(task: str = "t2v", layers: int = LAYERS) -> Inputs:
    return tiny.random_inputs(tiny.tiny_arch(task, num_layers=layers), 1, (2, 4, 4), text_tokens=5)


def on_meta(
    mm_types: str | dict[str, str], task: str = "t2v", layers: int = LAYERS, device: DeviceInfo = CPU
) -> WanDiT:
    """The model without weights, each linear of its blocks of the mm_type of the last glob that matches it."""
    types = {"*": mm_types} if isinstance(mm_types, str) else mm_types
    with torch.device("meta"):
        model = WanDiT(tiny.tiny_arch(task, num_layers=layers)).eval()
    plans: dict[str, LayerPlan] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and any(fnmatchcase(name, glob) for glob in WAN.quantized):
            mm_type = [kind for glob, kind in types.items() if fnmatchcase(name, glob)][-1]
            shape = (layer.out_features, layer.in_features)
            plans[name] = plan_layer(name, mm_type, parse(mm_type), *shape, device=device, fallback=False)
    swap_linears(model, plans, DTYPE, auto_quant=True)
    return model


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if any(fnmatchcase(name, glob) for glob in WanDiT.fp32_names) else DTYPE


def plain(
    file: Path,
    mm_types: str | dict[str, str] = "Default",
    task: str = "t2v",
    layers: int = LAYERS,
    device: DeviceInfo = CPU,
) -> WanDiT:
    """The model whole in memory."""
    model = on_meta(mm_types, task, layers, device)
    there = torch.device(device.torch_name)
    stream_into(model, source_of(file).read(), device=there, dtype_of=dtype_of, where="here")
    fuse_projections(model)
    return model


def offloaded(
    file: Path,
    mm_types: str | dict[str, str] = "Default",
    task: str = "t2v",
    layers: int = LAYERS,
    device: DeviceInfo = CPU,
    keep_first: int = 0,
    ready: Callable[[nn.Module], None] | None = None,
    **settings: Any,
) -> tuple[WanDiT, Offloaded]:
    """The same, offloaded as `settings` say."""
    model = on_meta(mm_types, task, layers, device)
    config = OffloadConfig(enabled=True, **settings)
    source = source_of(file)
    more: dict[str, Any] = {"keep_first": keep_first, "ready": ready}
    loaded = load_offloaded(model, source, config, device=device, dtype_of=dtype_of, where="here", **more)
    return model, loaded


@torch.inference_mode()
def run(model: WanDiT, inputs: Inputs) -> Tensor:
    latents, timestep, conditions = inputs
    out: Tensor = model(latents, timestep, conditions)
    return out
