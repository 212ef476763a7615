"""The parts of a pipeline in memory: loaded from a plan on first use, kept for the next request or freed after use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from loguru import logger
from torch import Tensor, nn

from lightx2v import platform
from lightx2v.attention.scales import hold_scales
from lightx2v.families.base import PartSource
from lightx2v.features.compile import compile_blocks
from lightx2v.features.graphs import Graphs
from lightx2v.features.lora.attach import Loras
from lightx2v.features.lora.source import LoraSource
from lightx2v.features.offload.attach import Offloaded, Parked
from lightx2v.features.offload.load import load_offloaded
from lightx2v.features.once import OnceParts
from lightx2v.io.source import CheckpointSource
from lightx2v.io.weights import stream_into
from lightx2v.mm.fused import fuse_projections
from lightx2v.mm.linear import swap_linears
from lightx2v.mm.select import LayerPlan
from lightx2v.models.spec import FamilySpec
from lightx2v.plan import Plan
from lightx2v.timing import StageTimer


@dataclass(frozen=True)
class LoadedDiT:
    """A DiT with its weights, and what is attached to it."""

    model: Any
    once: OnceParts
    loras: Loras
    graphs: Graphs | None = None
    offloaded: Offloaded | None = None


def load_dit(plan: Plan, fuse: bool = True) -> LoadedDiT:
    """The DiT of a plan with the weights of its checkpoint, and its features.

    Without `fuse` each linear stays a module of its own under its own name; offload does not take that.
    """
    part, family, config = plan.components["dit"], plan.family, plan.config
    device, dtype = torch.device(plan.device.torch_name), getattr(torch, config.dtype)
    where = str(part.checkpoint)
    plain = CheckpointSource(family.open(part.checkpoint), family.original_name, family.is_unused, part.read_raw())
    source = LoraSource(plain, plan.loras, device)
    loras = Loras(source, dtype, uniform=config.compile or config.graphs)
    arch = plan.files.arch
    model = empty_dit(family, arch, part.by_name(), dtype, part.auto_quant)
    hold_scales(model, cast(Any, model).attention_parts(), source.names, arch.num_heads, arch.head_dim)
    offloaded = None
    if plan.offload.settings.enabled:
        offloaded = load_offloaded(
            model,
            source,
            plan.offload.settings,
            device=plan.device,
            dtype_of=dtype_of(model, dtype),
            where=where,
            keep_first=plan.keep_first,
            ready=loras.attach,
        )
    else:
        fill_dit(model, source.read(), device, dtype, where, fuse)
        loras.attach(model)
    if config.compile:
        compile_blocks(model)  # type: ignore[arg-type]
    record = platform.graph_recorder(plan.device) if config.graphs else None
    graphs = None if record is None else Graphs(record)
    return LoadedDiT(model.eval(), OnceParts(model, source, device, where), loras, graphs, offloaded)


def empty_dit(
    family: FamilySpec, arch: Any, plans: Mapping[str, LayerPlan], dtype: torch.dtype, auto_quant: bool
) -> nn.Module:
    """A DiT on meta, its linears exchanged for those of `plans`. `dtype` is what it computes in."""
    with torch.device("meta"):
        module = family.build_dit(arch)
    swap_linears(module, plans, dtype, auto_quant)
    return module


def dtype_of(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What each parameter of a DiT is held in, by name."""
    exact: Sequence[str] = cast(Any, model).fp32_names
    return lambda name: torch.float32 if any(fnmatchcase(name, glob) for glob in exact) else dtype


def fill_dit(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    fuse: bool = True,
) -> None:
    """Stream `tensors`, by original name, into a DiT on meta; `where` is what an error names as their source."""
    stream_into(model, tensors, device=device, dtype_of=dtype_of(model, dtype), where=where)
    if fuse:
        fuse_projections(model)


class Components:
    """The models that a plan names. `with components.use("vae") as vae:` loads at need; `fuse` as in `load_dit`."""

    def __init__(self, plan: Plan, fuse: bool = True) -> None:
        self.plan, self.fuse = plan, fuse
        self._loaded: dict[str, Any] = {}
        self._coming: dict[str, Future[Any]] = {}
        self._parked: dict[str, Parked] = {}

    def _load(self, name: str) -> Any:
        plan = self.plan
        if name == "dit":
            return load_dit(plan, self.fuse)
        part = next(part for part in plan.family.surroundings.parts if part.name == name)
        planned = plan.components.get(name)
        source = PartSource(
            part.find(plan.config, plan.files) if planned is None else planned.checkpoint,
            plan.files,
            torch.device(plan.device.torch_name),
            getattr(torch, plan.config.dtype),
            {} if planned is None else planned.quantized(),
            plan.config,
        )
        return part.load(source)

    @property
    def loads_ahead(self) -> bool:
        """Whether a part may load while another one computes: not where that shares its cores, or its memory."""
        return self.plan.device.kind != "cpu" and not self.plan.config.unload_modules

    def load_ahead(self, name: str) -> None:
        """Begin to load the component `name` in a thread; `use` waits for it, and raises what that has raised."""
        if self.loads_ahead and name not in self._loaded and name not in self._coming:
            threads = ThreadPoolExecutor(1, thread_name_prefix=f"load {name}")
            self._coming[name] = threads.submit(self._load_apart, name)
            threads.shutdown(wait=False)

    def _load_apart(self, name: str) -> Any:
        with torch.inference_mode():  # a thread's own
            return self._load(name)

    def _load_or_wait(self, name: str) -> Any:
        coming = self._coming.pop(name, None)
        return self._load(name) if coming is None else coming.result()

    @contextmanager
    def use(self, name: str, timer: StageTimer) -> Iterator[Any]:
        """The component `name`, for as long as the block lasts when `unload_modules` is set."""
        if name not in self._loaded:
            with timer.stage(f"load {name}"):
                logger.debug("loading {}", name)
                self._loaded[name] = self._load_or_wait(name)
        try:
            with self._on_device(name):
                yield self._loaded[name]
        finally:
            if self.plan.config.unload_modules:
                self.unload(name)

    def _on_device(self, name: str) -> AbstractContextManager[None]:
        """The device holds a part that is offloaded inside, and only there. On a CPU nothing would be saved."""
        part = next((part for part in self.plan.family.surroundings.parts if part.name == name), None)
        if part is None or self.plan.device.kind == "cpu" or not getattr(self.plan.config.offload, part.kind):
            return nullcontext()
        if name not in self._parked:
            self._parked[name] = Parked([("", self._loaded[name].module)], self.plan.device)
        return self._parked[name].running()

    def unload(self, name: str) -> None:
        """Free one component."""
        self._parked.pop(name, None)
        if (coming := self._coming.pop(name, None)) is not None:
            wait([coming])
        if self._loaded.pop(name, None) is not None:
            gc.collect()
            platform.empty_cache(self.plan.device)
