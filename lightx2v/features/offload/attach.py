"""Modules whose weights come when they are called, or for as long as a loop runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightx2v.features.offload.ring import Report, Ring
from lightx2v.features.offload.slab import Slab
from lightx2v.features.offload.store import HostStore, Store
from lightx2v.platform import CopyQueue, DeviceInfo, host_memory, trim_memory


class Offloaded(Protocol):
    """A model whose weights are not all on the device."""

    report: Report

    @property
    def host_bytes(self) -> int:
        """Host memory that the weights take while they are away."""
        ...

    def running(self, passes: int | None = None) -> Any:
        """A context in which the model can be called. `passes`: how many forwards compute their blocks, if known."""
        ...


def allocate(nbytes: int, device: DeviceInfo) -> Tensor:
    """uint8 [nbytes] on `device`."""
    with torch.inference_mode(False):  # a compiled graph tells tensors of inference mode from others
        if device.kind == "cpu":
            return host_memory(nbytes, device)
        return torch.empty(nbytes, dtype=torch.uint8, device=device.torch_name)


class Parked:
    """Modules that are on the device for as long as `running` lasts, and in host memory otherwise.

    Taken at first from where they were loaded: on the device, since layers pack their weights for it. Weights do not
    change while they are there, so nothing is copied back.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], device: DeviceInfo) -> None:
        self.report = Report()
        self._device, self._queue = device, CopyQueue(device)
        self._store = HostStore(device, self._queue)
        self._units: list[tuple[Slab, list[Tensor]]] = []
        for name, module in modules:
            self.add(Slab.of([(name, module)]))

    def add(self, slab: Slab) -> None:
        """Take the tensors of one more unit off the device."""
        away = self._store.add(slab)
        slab.bind(away)
        self._units.append((slab, away))

    @property
    def host_bytes(self) -> int:
        return self._store.host_bytes

    @contextmanager
    def running(self, passes: int | None = None) -> Iterator[None]:
        try:
            waits = []
            for number, (slab, _) in enumerate(self._units):
                memory = allocate(slab.nbytes, self._device)
                waits.append(self._store.start(number, memory, self._queue.mark()))
                slab.bind(slab.views(memory))
                self.report.units += 1
                self.report.nbytes += slab.nbytes
            for wait in waits:
                self._queue.wait(wait())
            yield
        finally:
            self._store.close()
            for slab, away in self._units:
                slab.bind(away)
            trim_memory()


class Streamed:
    """Units that pass through a ring of slots, each bound while a method of its modules runs.

    `tight`: after each of them, memory that it has freed goes back to the system, which would find it in pieces later.
    """

    def __init__(self, device: DeviceInfo, queue: CopyQueue, store: Store, tight: bool = False) -> None:
        self._device, self._queue, self._store, self._tight = device, queue, store, tight
        self._slabs: list[Slab] = []
        self._away: list[list[Tensor]] = []
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._depth: list[int] = []
        self._made: Ring | None = None
        self.report = Report()

    def add(self, slab: Slab) -> int:
        """Take the tensors of the next unit, in order of use, off the device. Returns its number."""
        away = self._store.add(slab)
        slab.bind(away)
        self._slabs.append(slab)
        self._away.append(away)
        self._depth.append(0)
        return len(self._slabs) - 1

    @property
    def host_bytes(self) -> int:
        return self._store.host_bytes

    @property
    def ring(self) -> Ring:
        """The slots, for all units that were added before it was first asked for."""
        if self._made is None:
            sizes = [slab.nbytes for slab in self._slabs]
            self._made = Ring(sizes, self._store, self._queue, lambda size: allocate(size, self._device))
            self._made.report = self.report
        return self._made

    @contextmanager
    def running(self, passes: int | None = None) -> Iterator[None]:
        if not self._slabs:
            yield
            return
        try:
            self.ring.open(passes)
            yield
        finally:
            self.ring.close()
            self._views = {}

    @contextmanager
    def using(self, unit: int, ahead: bool = True) -> Iterator[None]:
        """The modules of `unit` have their weights inside. `ahead`: begin with the next unit as well."""
        self._depth[unit] += 1
        try:
            if self._depth[unit] > 1:
                yield
                return
            slot, memory = self.ring.acquire(unit, ahead)
            if (unit, slot) not in self._views:
                self._views[unit, slot] = self._slabs[unit].views(memory)
            self._slabs[unit].bind(self._views[unit, slot])
            try:
                yield
            finally:
                self._slabs[unit].bind(self._away[unit])
                self.ring.release(unit)
                if self._tight:
                    trim_memory()
        finally:
            self._depth[unit] -= 1

    def guard(self, module: nn.Module, unit: int, names: Sequence[str] = ("forward",)) -> None:
        """Let methods of `module` run inside `using`; only `forward` begins with the next unit."""
        for name in names:
            setattr(module, name, self._guarded(getattr(module, name), unit, name == "forward"))

    def _guarded(self, method: Callable[..., Any], unit: int, ahead: bool) -> Callable[..., Any]:
        @wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self.using(unit, ahead):
                return method(*args, **kwargs)

        return guarded


def methods(module: nn.Module) -> list[str]:
    """`forward`, and the public methods that the classes of this engine or its users add to nn.Module's."""
    own = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.") and cls is not object]
    names = {name for cls in own for name, value in vars(cls).items() if inspect.isfunction(value)}
    return ["forward", *sorted(name for name in names if not name.startswith("_") and not hasattr(nn.Module, name))]
