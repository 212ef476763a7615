"""A GPU that is not there: torch's meta device stands for it. What waits for one, inside `watching`, is an error.

Its tensors have shapes and dtypes and no values; kernels in Triton are known by the fakes of their operators. Tensors
of the CPU are real, so that what the host computes for itself is computed.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightx2v
from lightx2v import elementwise
from lightx2v.platform import DeviceInfo


@dataclass(frozen=True)
class _Absent(DeviceInfo):
    @property
    def torch_name(self) -> str:
        return "meta"


GPU = _Absent("cuda", 0, "a GPU that is not there", (9, 0), 140 << 30, 140 << 30)
_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select", "unique_consecutive")
"""Operators whose result, or its shape, is known when the device is done."""


class HostWaitError(AssertionError):
    """The host would wait for the device here."""


class AbsentGpu(TorchDispatchMode):
    """Inside `watching`, operators are counted, and HostWaitError says where the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.watches = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.watches = True
        try:
            yield
        finally:
            self.watches = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where compound operators come as they are, not as what they consist of
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if self.watches:
            name = func.name().partition("::")[2].partition(".")[0]
            self.counts[name] += 1
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if reason := _wait(name, given, args, kwargs):
                raise HostWaitError(f"{reason}, at {_where()}")
        return func(*args, **kwargs)


def move(model: nn.Module) -> None:
    """Every tensor of `model` to the GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")


def _wait(name: str, given: list[Tensor], args: Any, kwargs: Any) -> str | None:
    """Why the host waits for an operator of this name; None where it does not."""
    if not any(tensor.is_meta for tensor in given) and torch.device("meta") != kwargs.get("device"):
        return None
    if name in _READS:
        return f"{name} reads a tensor of the device"
    if name in ("index", "index_put_", "index_put") and any(t.dtype == torch.bool for t in given[1:]):
        return f"{name} with a mask looks for the places that are set"
    if name == "_to_copy" and kwargs.get("device", given[0].device) != given[0].device:
        return None if kwargs.get("non_blocking") else f"a copy from {given[0].device} to {kwargs['device']}"
    if name == "copy_" and given[0].device != given[1].device:
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return f"a copy from {given[1].device} to {given[0].device}" if waits else None
    return None


def _where() -> str:
    """The innermost line of the package."""
    package = str(Path(lightx2v.__file__).parent)
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
    return f"{frames[-1].filename.removeprefix(package)}: {frames[-1].line}" if frames else "no line of the package"


def _copying(make: Callable[..., Tensor], gpu: AbsentGpu) -> Callable[..., Tensor]:
    """What makes tensors of the host's values: on a GPU it copies them there, on meta it need not."""

    def made(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if gpu.watches and torch.device(kwargs.get("device") or "cpu").type == "meta":
            raise HostWaitError(f"values of the host for the device, at {_where()}")
        return make(data, *args, **kwargs)

    return made


@contextmanager
def absent_gpu() -> Iterator[AbsentGpu]:
    """The kernels in Triton serve it, as operators."""
    from lightx2v.kernels import ops

    with pytest.MonkeyPatch.context() as patch, AbsentGpu() as gpu:
        for name in vars(ops):
            if operator := getattr(torch.ops.lightx2v, f"triton_{name}", None):
                patch.setattr(ops, name, operator)
        patch.setattr(torch, "tensor", _copying(torch.tensor, gpu))
        patch.setattr(torch, "as_tensor", _copying(torch.as_tensor, gpu))
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which knows no meta device
        patch.setattr(elementwise, "usable", lambda device: device.type != "cpu")
        yield gpu
