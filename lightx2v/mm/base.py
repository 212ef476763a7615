"""What a library of matrix-multiplication kernels shows to the rest of the engine.

Shapes: M tokens, K input channels, N output channels; weights are [N, K] in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.elementwise import gelu_tanh
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo
from lightx2v.quant.numerics import Quantized, quantize_activation, rounding_of
from lightx2v.quant.spec import QSpec

Numerics = tuple[QSpec | None, QSpec | None]
NOT_COMPUTED = "does not compute this scheme"
Leaves = Mapping[str, Tensor]
"""The tensors of one quantized weight by their last name in a checkpoint: `weight`, `weight_scale`, and so on."""


@dataclass(frozen=True, slots=True)
class Caps:
    """What a library can do, so that its quirks are data here and not branches elsewhere."""

    schemes: frozenset[Numerics]
    """(weight, activation) pairs that it computes."""
    min_capability: tuple[int, int] | None = None
    """Lowest compute capability; None where it also runs without such a device."""
    capability: Mapping[str, tuple[tuple[int, int], tuple[int, int] | None]] = field(default_factory=dict)
    """The same by code dtype where that differs: lowest, and highest or None where later devices do as well."""
    k_multiple: int = 1
    n_multiple: int = 1
    layout: Literal["NK", "KN"] = "NK"
    """The shape in which its product takes the weight."""
    bias: Literal["fused", "fused_fp32", "after"] = "after"
    """Whether its product takes the bias (in the output dtype or in float32), or it is added to the float32 result."""
    out_dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float16, torch.bfloat16})
    """What it can round its results to; others are bfloat16 results converted."""
    exact: frozenset[str] = frozenset()
    """Code dtypes whose products are accumulated without any rounding."""
    rtol: float = 0.0
    """For the other dtypes: bound of |y - exact| / sum_k |x_k w_k|, before the rounding to the output dtype."""
    rtols: Mapping[Numerics, float] = field(default_factory=dict)
    """The same for single schemes, groups of integers being of any size."""

    def bound(self, scheme: Scheme) -> float:
        """`rtol` of one scheme."""
        return self.rtols.get(_alike(scheme), self.rtol)


def move_buffers(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """`fn` of every buffer, each in the dtype it has.

    Module.to(dtype) counts fp8 codes and float32 scales among the floating-point tensors that it may round.
    """
    for name, old in module._buffers.items():
        if old is not None:
            new = fn(old)
            module._buffers[name] = new if new.dtype == old.dtype else old.to(new.device)


class Packed(nn.Module):
    """A weight [n, k] as the kernel `method` of a library wants it; its buffers keep their dtype when moved."""

    weight: Tensor
    scale: Tensor

    def __init__(self, method: str, n: int, k: int, **buffers: Tensor) -> None:
        super().__init__()
        self.method, self.n, self.k = method, n, k
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight with its scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        move_buffers(self, fn)
        return self


class Library(Protocol):
    """One library. Methods that give `str | None` give a reason why not, or None for yes."""

    name: str
    caps: Caps

    def available(self, device: DeviceInfo) -> str | None:
        """Whether it is installed and can run on `device`."""
        ...

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        """Whether it computes `scheme` for a weight [n, k]."""
        ...

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        """How it will compute `scheme`, in a few words for the plan."""
        ...

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> float:
        """Bytes that each code of a weight takes on `device` once it is packed."""
        ...

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        """Pack the tensors that `quant.formats` lists for the scheme's weight, once, on the device they are on."""
        ...

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        """The tensors that `prepare` was given."""
        ...

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        """Quantize activations [M, K] into what `gemm` takes; `packed` has the scales of a static scheme."""
        ...

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x @ weight.T + bias as [M, N], for M > 0. `bias` is float32 [N]."""
        ...

    def linear(self, scheme: Scheme, x: Tensor, packed: Packed, bias: Tensor | None, gelu: bool = False) -> Tensor:
        """`quantize` and `gemm` in one, for x [M, K] with M > 0, and a GELU (tanh): [M, N] in the dtype of x."""
        ...


class TwoSteps:
    """`linear` for a library that has no kernel for both steps in one."""

    def linear(
        self: Library, scheme: Scheme, x: Tensor, packed: Packed, bias: Tensor | None, gelu: bool = False
    ) -> Tensor:
        """Quantize, then multiply."""
        out = self.gemm(scheme, self.quantize(scheme, x, packed), packed, bias, x.dtype)
        return gelu_tanh(out) if gelu else out


class TorchQuantize(TwoSteps):
    """Activations quantized in torch, with the rounding of the library that the scheme names."""

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        """Codes and scales of the activations [M, K], where K is filled up with zeros to whole groups.

        Inductor (torch 2.13, CPU) computes k // 128 wrongly in a loop whose length is no multiple of 128.
        """
        assert scheme.activation is not None
        if scheme.activation.granularity == "group":
            x = F.pad(x, (0, -x.shape[1] % scheme.activation.size))
        return quantize_activation(x, scheme.activation, rounding_of(scheme.act_library, scheme.activation))


def rescale(product: Tensor, packed: Packed, x: Quantized, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The end of a product of codes [M, N]: channel and token scales and the bias in float32, then one rounding."""
    return add_bias(product.float().mul_(packed.scale.view(1, -1)).mul_(x.scale), bias, out_dtype)


def add_bias(product: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Add a float32 bias in float32 and round to `out_dtype`."""
    if bias is None:
        return product.to(out_dtype)
    return (product.float() + bias).to(out_dtype)


def span_words(lowest: tuple[int, int], highest: tuple[int, int] | None) -> str:
    """Compute capabilities from `lowest` to `highest`, in words."""
    if highest is None:
        return f"{lowest[0]}.{lowest[1]} or higher"
    return f"{lowest[0]}.{lowest[1]}" + (" alone" if highest == lowest else f" to {highest[0]}.{highest[1]}")


def capability_words(device: DeviceInfo) -> str:
    """The compute capability that a device has, in words."""
    return f"has {device.capability[0]}.{device.capability[1]}" if device.capability else "has none"


def computes(caps: Caps, scheme: Scheme) -> bool:
    """Whether `scheme` is among the schemes of `caps`, where groups of integers are of any size."""
    return scheme.numerics in caps.schemes or _alike(scheme) in caps.schemes


def _alike(scheme: Scheme) -> Numerics:
    """The scheme whose groups of integers stand for those of any size."""
    weight, activation = scheme.numerics
    return weight and weight.generic, activation and activation.generic


def lacks(caps: Caps, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
    """The first thing of `caps` that a layer does not meet."""
    if not computes(caps, scheme):
        return NOT_COMPUTED
    spec = scheme.weight
    lowest, highest = caps.capability.get(spec.dtype if spec else "", (caps.min_capability, None))
    have = device.capability or (0, 0)
    if lowest and (have < lowest or (highest and have > highest)):
        return f"needs compute capability {span_words(lowest, highest)}, {device.name} {capability_words(device)}"
    for what, value, multiple in (("K", k, caps.k_multiple), ("N", n, caps.n_multiple)):
        if value % multiple:
            return f"needs {what} to be a multiple of {multiple}, the layer has {value}"
    return None
