"""Every scheme in plain torch, on any device: what the other libraries are tested against. Slow by design.

int8 codes are accumulated exactly; all others are multiplied as float32 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.mm.base import Caps, Leaves, Packed, TwoSteps, add_bias, lacks, rescale
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo
from lightx2v.quant.activations import quantize_input
from lightx2v.quant.formats import dequantize_leaves, logical_shape, stored_kind
from lightx2v.quant.numerics import Quantized, rounding_of
from lightx2v.quant.spec import (
    FP4,
    FP4_DOUBLE,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TENSOR_DYNAMIC,
    FP8_TOKEN,
    GGUF,
    GGUF_KINDS,
    INT4_G64,
    INT4_G64_DYNAMIC,
    INT8_CHANNEL,
    INT8_TOKEN,
    MXFP4,
    MXFP4_DYNAMIC,
    MXFP6,
    MXFP8,
    MXFP8_DYNAMIC,
    NF4,
    NF4_DOUBLE,
    NVFP4,
    NVFP4_DYNAMIC,
    Granularity,
    QSpec,
    gguf_kind,
)

SCHEMES = frozenset({(INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN), (FP8_BLOCK128, FP8_GROUP128)})
"""The 8-bit schemes of tokens and groups."""
WHOLE = frozenset({(FP8_TENSOR, FP8_TENSOR), (FP8_TENSOR, FP8_TENSOR_DYNAMIC)})
"""fp8 with one scale for all tokens, from the checkpoint or not."""
W4A4 = (INT4_G64.generic, INT4_G64_DYNAMIC.generic)
BLOCKS = frozenset(
    {
        *((MXFP8, MXFP8_DYNAMIC), (MXFP6, MXFP8_DYNAMIC), (MXFP4, MXFP4_DYNAMIC), (NVFP4, NVFP4_DYNAMIC)),
        W4A4,
    },
)
"""Schemes with a scale for each 16, 32 or 64 values on both sides."""
_SIZES: tuple[tuple[Granularity, int], ...] = (("group", 128), ("channel", 0))
INTEGERS = tuple(
    QSpec(f"int{bits}", granularity, size, symmetric)
    for bits in (8, 4, 3, 2)
    for granularity, size in _SIZES
    for symmetric in (True, False)
)
"""Groups of any size are as those of 128 (`QSpec.generic`)."""
WEIGHT_ONLY = frozenset(
    (spec, None)
    for spec in (
        *(INT8_CHANNEL, FP8_CHANNEL, FP8_BLOCK128, FP8_TENSOR, MXFP8, MXFP6, MXFP4, NVFP4),
        *(NF4, NF4_DOUBLE, FP4, FP4_DOUBLE),
        *INTEGERS,
        *GGUF.values(),
    )
)
"""Quantized weights times activations as they are."""

_BUFFERS = {"weight_scale": "scale", "weight_global_scale": "global_scale", "weight_zero": "zero"}
_LEAVES = {buffer: leaf for leaf, buffer in _BUFFERS.items()}


def hold(scheme: Scheme, leaves: Leaves) -> Packed:
    """The tensors of a weight as they are. `k` is the columns that the codes have, groups filled up."""
    spec = scheme.weight
    assert spec is not None
    if gguf_kind(spec):
        return Packed(stored_kind(leaves["weight_type"]), *logical_shape(spec, leaves), weight=leaves["weight"])
    n, k = logical_shape(spec, leaves)
    return Packed("codes", n, k, **{_BUFFERS.get(leaf, leaf): leaves[leaf] for leaf in leaves})


def held_tensors(packed: Packed) -> dict[str, Tensor]:
    """The buffers of `hold` by the names of the tensors that it was given."""
    return {_LEAVES.get(name, name): tensor for name, tensor in packed.named_buffers()}


def held(scheme: Scheme, packed: Packed) -> dict[str, Tensor]:
    """The tensors that `hold` was given."""
    tensors = held_tensors(packed)
    if scheme.weight is not None and gguf_kind(scheme.weight):
        number = GGUF_KINDS[packed.method].number
        tensors["weight_type"] = torch.tensor(number, dtype=torch.int32, device=packed.weight.device)
    return tensors


def input_scale(packed: Packed) -> Tensor | None:
    """What the checkpoint has for the scale of the layer's input."""
    found = (packed._buffers.get(name) for name in ("input_scale", "input_global_scale"))
    return next((scale for scale in found if scale is not None), None)


class QuantizeAny(TwoSteps):
    """Activations of any scheme quantized in torch, with the rounding of the library that the scheme names."""

    def quantize(self, scheme: Scheme, x: Tensor, packed: Packed) -> Quantized:
        """Codes and scales of activations [M, K], K filled up to whole groups; x itself where none are quantized."""
        spec = scheme.activation
        if spec is None:
            return Quantized(x, x.new_ones(1))
        return quantize_input(x, spec, rounding_of(scheme.act_library, spec), input_scale(packed))


class Held(QuantizeAny):
    """A library that keeps codes and scales as the checkpoint has them, and runs on every device."""

    caps: Caps

    def available(self, device: DeviceInfo) -> str | None:
        return None

    def can_serve(self, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
        return lacks(self.caps, scheme, n, k, device)

    def code_bytes(self, scheme: Scheme, device: DeviceInfo) -> float:
        return held_code_bytes(scheme)

    def prepare(self, scheme: Scheme, leaves: Leaves) -> Packed:
        return hold(scheme, leaves)

    def unpack(self, scheme: Scheme, packed: Packed) -> Leaves:
        return held(scheme, packed)


class Reference(Held):
    """The scheme's definition as code. Keeps codes and scales as the checkpoint has them."""

    name = "reference"
    caps = Caps(SCHEMES | WHOLE | BLOCKS | WEIGHT_ONLY, exact=frozenset({"int8"}), rtol=1e-5)

    def describe(self, scheme: Scheme, device: DeviceInfo) -> str:
        return "plain torch, slow"

    def gemm(self, scheme: Scheme, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        assert scheme.weight is not None
        if scheme.activation is not None:
            if scheme.weight == INT8_CHANNEL:
                return rescale(int_product(x.codes, packed.weight), packed, x, bias, out_dtype)
            if scheme.weight.granularity in ("channel", "tensor"):
                return rescale(x.codes.float() @ packed.weight.float().t(), packed, x, bias, out_dtype)
        weight = dequantize_leaves(held(scheme, packed), scheme.weight)
        values = input_values(scheme, x, torch.float32)
        columns = min(values.shape[1], weight.shape[1])
        product = values[:, :columns] @ weight[:, :columns].t()
        return add_bias(product.mul_(of_tensor(scheme, x)), bias, out_dtype)


def held_code_bytes(scheme: Scheme) -> float:
    """Bytes of each code of a weight that is held as `hold` does."""
    assert scheme.weight is not None
    kind = gguf_kind(scheme.weight)
    if kind:
        return GGUF_KINDS[kind].nbytes / GGUF_KINDS[kind].values
    return (scheme.weight.bits or 8) / 8


def int_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of int8 a [M, K] and b [N, K] as integers [M, N].

    float32 adds integers exactly up to 2**24 = 1024 * 128 * 128, so slices of 1024 products are summed as integers.
    """
    k = a.shape[1]
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32 if k < 2**17 else torch.int64, device=a.device)
    for start in range(0, k, 1024):
        part = slice(start, start + 1024)
        total += (a[:, part].float() @ b[:, part].float().t()).to(total.dtype)
    return total


def dequantize_groups(x: Quantized, size: int, dtype: torch.dtype) -> Tensor:
    """Activations [M, K] from codes [M, K] and the scales [M, K/size] of groups along K."""
    groups = x.codes.float().unflatten(1, (-1, size)) * x.scale.unsqueeze(2)
    return groups.flatten(1).to(dtype)


def input_values(scheme: Scheme, x: Quantized, dtype: torch.dtype) -> Tensor:
    """The activations that codes of groups stand for, less nvfp4's scale of the tensor; x itself if not quantized."""
    spec = scheme.activation
    if spec is None:
        return x.codes.to(dtype)
    groups = x.scale[:, :-1] if spec.dtype == "nvfp4" else x.scale
    return dequantize_groups(Quantized(x.codes, groups), spec.size, dtype)


def of_tensor(scheme: Scheme, x: Quantized) -> Tensor | float:
    """nvfp4's scale of the whole input, a factor for each row; 1 for every other scheme."""
    return x.scale[:, -1:] if scheme.activation is not None and scheme.activation.dtype == "nvfp4" else 1.0


LIBRARY = Reference()
