"""What is attached to a DiT: its cache, its LoRAs, and where its weights are. Decided from sizes and headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightx2v.config.features import LoraConfig
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.features.cache.build import build
from lightx2v.features.cache.facts import Facts
from lightx2v.features.cache.report import Cache
from lightx2v.features.lora.plan import LoraPlan, plan_loras
from lightx2v.features.offload.choose import Placement, Sizes, decide, measure
from lightx2v.io.dtypes import DTYPE_BYTES
from lightx2v.models.spec import FamilySpec
from lightx2v.plan.conflicts import varies
from lightx2v.plan.layers import ComponentPlan
from lightx2v.plan.plan import Plan
from lightx2v.platform import DeviceInfo, compiler_for, graph_recorder, select_device
from lightx2v.request import Request


def check_compilers(config: Config, device: DeviceInfo, dit: ComponentPlan) -> None:
    """Raise ConfigError where `compile` or `graphs` cannot be had on `device`, or not for the layers of `dit`."""
    if config.compile and (missing := compiler_for(device)):
        raise ConfigError("compile", f"is true, but {missing}", do="install it, or set compile to false")
    if config.vae.compile and (missing := compiler_for(device)):
        raise ConfigError("vae.compile", f"is true, but {missing}", do="install it, or set vae.compile to false")
    if config.graphs and graph_recorder(device) is None:
        raise ConfigError("graphs", f"is true, and {device.name} records no graphs", do="set graphs to false")
    for layer in dit.layers if config.graphs else ():
        if varies(layer.scheme):
            raise ConfigError(
                "graphs",
                f"is true, and layer '{layer.name}' has mm_type '{layer.mm_type}', which computes other things"
                " at other steps, where a recorded graph always does the same",
                do="leave one of them out",
            )


def plan_cache(module: Any, config: Config, family: FamilySpec, files: Any, request: Request) -> Cache | None:
    """The cache of `module`, a DiT on meta. Raises ConfigError."""
    facts = Facts.of(
        module,
        family=family.name,
        task=request.task,
        width=files.arch.dim,
        pixels=request.height * request.width,
        variant=getattr(files, "variant", ""),
        cfg=request.cfg,
        dtype=getattr(torch, config.dtype),
    )
    return build(config.cache, facts)


def plan_lora(module: nn.Module, config: Config, family: FamilySpec, dit: ComponentPlan) -> LoraPlan:
    """The LoRAs of `module`, a DiT on meta. Raises CheckpointError and ConfigError."""
    quantized = {name for name, layer in dit.quantized().items() if layer.scheme.weight or layer.library == "custom"}
    return plan_loras(
        config.lora,
        module,
        family.aliases,
        dynamic=config.lora_dynamic,
        quantized=quantized,
        stored=set() if dit.auto_quant else quantized,
        folded=dit.folded,
    )


def replan_loras(plan: Plan, loras: Sequence[LoraConfig]) -> Plan:
    """`plan` with other LoRAs. Raises CheckpointError and ConfigError."""
    config = plan.config.model_copy(update={"lora": tuple(loras)})
    with torch.device("meta"):
        module = plan.family.build_dit(plan.files.arch)
    return replace(plan, config=config, loras=plan_lora(module, config, plan.family, plan.components["dit"]))


def place_weights(
    module: nn.Module,
    config: Config,
    dit: ComponentPlan,
    device: DeviceInfo,
    *,
    peak: Callable[[Placement], int],
    keep_first: int,
) -> Placement:
    """Where the weights of `module`, a DiT on meta, are; `peak` are the bytes that all takes with them there."""
    limit = config.max_memory_gb
    return decide(
        config.offload,
        weight_sizes(module, dit, DTYPE_BYTES[config.dtype]),
        device,
        peak=peak,
        available=device.free_memory if limit is None else int(limit * 1024**3),
        host_free=select_device("cpu").free_memory,
        keep_first=keep_first,
        compiled=config.compile,
    )


def weight_sizes(module: nn.Module, dit: ComponentPlan, dtype_bytes: int) -> Sizes:
    """The bytes of a DiT's weights by block."""
    weights: Mapping[str, int] = dit.layer_bytes
    rest = {
        name: parameter.numel() * dtype_bytes
        for name, parameter in module.named_parameters()
        if not (name.endswith(".weight") and name.rpartition(".")[0] in weights)
    }
    sizes = {**{f"{name}.weight": size for name, size in weights.items()}, **rest}
    return measure(module, sizes, dit.loop_bytes)
