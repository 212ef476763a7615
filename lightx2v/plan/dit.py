"""How the layers of a DiT are computed, held against the headers of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from lightx2v.attention.policy import AttentionPolicy
from lightx2v.attention.scales import check_scales, child_of, named_parts
from lightx2v.config.schema import Config
from lightx2v.errors import CheckpointError
from lightx2v.features.once import once_names
from lightx2v.io.declared import declared_layers
from lightx2v.io.dtypes import DTYPE_BYTES
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import parse
from lightx2v.models.spec import FamilySpec
from lightx2v.plan.layers import ComponentPlan, plan_component
from lightx2v.platform import DeviceInfo


def linear_shapes(module: nn.Module, family: FamilySpec) -> dict[str, tuple[int, int]]:
    """(N, K) of the linears of a DiT that `mm_type` applies to, by full name."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and family.quantizes(name)
    }


def _declared_shapes(
    module: nn.Module, checkpoint: Checkpoint, rename: Callable[[str], str]
) -> dict[str, tuple[int, int]]:
    """The same for the linears that a file of another package quantizes, which a family would leave alone."""
    declared = {rename(layer) for layer in declared_layers(checkpoint.metadata)}
    modules = {name: layer for name, layer in module.named_modules() if name in declared}
    return {n: (layer.out_features, layer.in_features) for n, layer in modules.items() if isinstance(layer, nn.Linear)}


def check_dit_tensors(module: nn.Module, checkpoint: Checkpoint, rename: Callable[[str], str], where: str) -> None:
    """Every parameter of the DiT must be in the header with its shape; a weight's shape alone tells most mix-ups."""
    found = {rename(name): info for name, info in checkpoint.tensors.items()}
    wanted = dict(module.named_parameters())
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            where,
            f"{len(missing)} of {len(wanted)} tensors of the model are missing, such as '{missing[0]}'",
            do="check that the file belongs to this family, size and task, and that it is whole",
        )
    for name, parameter in wanted.items():
        if name.endswith(".weight") and found[name].dtype in ("U8", "I32"):
            continue  # packed codes; whether they are as the layer's mm_type reads them is looked at with it
        if found[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                where,
                f"'{name}' has shape {found[name].shape}, the model of config.json wants {tuple(parameter.shape)}",
                do="check that the file belongs to this family, size and task",
            )


def _dit_checkpoint(config: Config, files: Any) -> Path:
    """The DiT's weights: the quantized checkpoint, LightX2V's usual place for one, or the model's own."""
    if config.dit_quantized_ckpt is not None:
        return Path(config.dit_quantized_ckpt)
    mm = config.mm_config
    spec = None if mm.mm_type == "auto" or mm.weight_auto_quant else parse(mm.mm_type).weight
    if spec is not None and (folder := files.root / spec.dtype).is_dir():
        return Path(folder)
    return Path(files.require("dit"))


def plan_dit(module: nn.Module, config: Config, family: FamilySpec, files: Any, device: DeviceInfo) -> ComponentPlan:
    """The plan of `module`, a DiT on meta. Raises CheckpointError for a checkpoint that is not its own."""
    mm = config.mm_config
    path = _dit_checkpoint(config, files)
    checkpoint = family.open(path)
    rename = family.original_name
    check_dit_tensors(module, checkpoint, rename, str(path))
    return plan_component(
        "dit",
        checkpoint,
        path,
        linear_shapes(module, family) | _declared_shapes(module, checkpoint, rename),
        rename=rename,
        mm_type=mm.mm_type,
        rules=mm.rules,
        auto_quant=mm.weight_auto_quant,
        fallback=mm.fallback,
        device=device,
        dtype_bytes=DTYPE_BYTES[config.dtype],
        once=once_names(module),
    )


def check_attention(
    module: nn.Module, policy: AttentionPolicy, family: FamilySpec, planned: ComponentPlan, heads: int
) -> None:
    """Raise CheckpointError where an attention of `module` is to read scales that its checkpoint does not have."""
    if not (static := policy.static_slots()):
        return
    parts = [part for part in cast(Any, module).attention_parts() if (part.layer, part.part) in static]
    holders = [f"{name}.{child_of(attribute)}" for name, attribute in named_parts(module, parts)]
    needed = {holder: static[part.layer, part.part] for holder, part in zip(holders, parts, strict=True)}
    tensors = family.open(planned.checkpoint).tensors
    shapes = {family.original_name(name): info.shape for name, info in tensors.items()}
    check_scales(str(planned.checkpoint), needed, shapes, heads)
