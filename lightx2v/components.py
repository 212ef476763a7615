"""The parts of a pipeline in memory: loaded from a plan on first use, kept for the next request or freed after use."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from loguru import logger
from torch import Tensor, nn

from lightx2v import platform
from lightx2v.attention.base import AttentionFn
from lightx2v.families.base import PartSource
from lightx2v.features.compile import compile_blocks
from lightx2v.features.once import OnceParts
from lightx2v.io.source import CheckpointSource
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.mm.fused import fuse_projections
from lightx2v.mm.linear import swap_linears
from lightx2v.mm.select import LayerPlan
from lightx2v.models.base import set_attention
from lightx2v.models.spec import FamilySpec
from lightx2v.plan import Plan
from lightx2v.timing import StageTimer


@dataclass(frozen=True)
class LoadedDiT:
    """A DiT with its weights, and what a request needs around its loop."""

    model: nn.Module
    once: OnceParts


def load_dit(plan: Plan) -> LoadedDiT:
    """The DiT of a plan with the weights of its checkpoint."""
    part, family = plan.components["dit"], plan.family
    device, where = torch.device(plan.device.torch_name), str(part.checkpoint)
    checkpoint = Checkpoint.open(part.checkpoint)
    source = CheckpointSource(checkpoint, family.original_name, family.is_unused, part.read_raw())
    model = assemble_dit(
        family,
        plan.files.arch,
        part.by_name(),
        source.read(),
        device=device,
        dtype=getattr(torch, plan.config.dtype),
        auto_quant=part.auto_quant,
        attention=plan.attention,
        compiled=plan.config.compile,
        where=where,
    )
    return LoadedDiT(model, OnceParts(model, source, device, where))


def assemble_dit(
    family: FamilySpec,
    arch: Any,
    plans: Mapping[str, LayerPlan],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    auto_quant: bool,
    attention: AttentionFn,
    compiled: bool,
    where: str,
) -> nn.Module:
    """Build a DiT on meta, exchange its linears, stream `tensors` (by original name) into place, attach features.

    `dtype` is what it computes in, `where` what an error names as the source of the tensors.
    """
    with torch.device("meta"):
        module = family.build_dit(arch)
    swap_linears(module, plans, dtype, auto_quant)
    dit = cast(Any, module)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if any(fnmatchcase(name, glob) for glob in dit.fp32_names) else dtype

    stream_into(module, tensors, device=device, dtype_of=dtype_of, where=where)
    fuse_projections(module)
    set_attention(dit, attention)
    if compiled:
        compile_blocks(dit)
    return module.eval()


class Components:
    """The models that a plan names. `with components.use("vae") as vae:` loads at need."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._loaded: dict[str, Any] = {}

    def _load(self, name: str) -> Any:
        plan = self.plan
        if name == "dit":
            return load_dit(plan)
        part = next(part for part in plan.family.surroundings.parts if part.name == name)
        planned = plan.components.get(name)
        source = PartSource(
            plan.files.require(part.file) if planned is None else planned.checkpoint,
            plan.files,
            torch.device(plan.device.torch_name),
            getattr(torch, plan.config.dtype),
            {} if planned is None else planned.quantized(),
        )
        return part.load(source)

    @contextmanager
    def use(self, name: str, timer: StageTimer) -> Iterator[Any]:
        """The component `name`, for as long as the block lasts when `unload_modules` is set."""
        if name not in self._loaded:
            with timer.stage(f"load {name}"):
                logger.debug("loading {}", name)
                self._loaded[name] = self._load(name)
        try:
            yield self._loaded[name]
        finally:
            if self.plan.config.unload_modules:
                self.unload(name)

    def unload(self, name: str) -> None:
        """Free one component."""
        if self._loaded.pop(name, None) is not None:
            gc.collect()
            platform.empty_cache(self.plan.device)
