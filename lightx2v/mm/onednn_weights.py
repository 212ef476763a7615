"""Weight-only schemes on a CPU by oneDNN's bfloat16 product: the compiled kernel turns a panel of codes at a time into
bfloat16, which holds each of them exactly, and applies scales and zero points to the sums in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm.base import Leaves, Packed
from lightx2v.mm.reference import INTEGERS
from lightx2v.mm.scheme import Scheme
from lightx2v.native import ops
from lightx2v.native.build import kernels
from lightx2v.quant.integers import pack_integers, unpack_integers
from lightx2v.quant.spec import FP8_CHANNEL, INT8_CHANNEL, QSpec

PANEL = 64
"""Output channels that the kernel computes at a time."""
_LARGEST_GROUP = 1024
"""Input channels under one scale that fit its caches."""

SCHEMES = frozenset(
    (spec, None) for spec in (INT8_CHANNEL, FP8_CHANNEL, *(spec for spec in INTEGERS if spec.dtype != "int3"))
)


def refuses(spec: QSpec) -> str | None:
    """Why the kernel cannot compute a weight of `spec`; None when it can."""
    if spec.granularity == "group" and (spec.size % 32 or spec.size > _LARGEST_GROUP):
        return f"needs groups of a multiple of 32 up to {_LARGEST_GROUP}, these are of {spec.size}"
    return kernels().lacks("bfloat16")


def prepare(spec: QSpec, leaves: Leaves) -> Packed:
    """Codes as [panels, K/2, bytes of 64 x 2 codes]; scales and zero points as `ops.weight_only` wants them."""
    scale, zero = leaves["weight_scale"], leaves.get("weight_zero")
    codes = _codes(spec, leaves["weight"])
    n, k = codes.shape
    by_group = spec.granularity == "group"
    # Groups are whole already; rows are filled up to what oneDNN multiplies fast.
    weight = _squeeze(_panels(codes, spec.size if by_group else PANEL), _bits(spec) or 8)
    packed = Packed("weight_only", n, k, weight=weight, scale=_by_panel(scale) if by_group else scale.reshape(-1))
    if zero is not None:
        packed.register_buffer("zero", _by_panel(zero), persistent=False)
    return packed


def unpack(spec: QSpec, packed: Packed) -> Leaves:
    """The tensors that `prepare` was given."""
    n, k = packed.n, packed.k
    steps = _spread(packed.weight, _bits(spec) or 8)
    codes = steps.view(steps.shape[0], -1, PANEL, 2).transpose(1, 2).reshape(-1, 2 * steps.shape[1])[:n, :k]
    by_group = spec.granularity == "group"
    leaves = {
        "weight": _stored(spec, codes.contiguous()),
        "weight_scale": _by_row(packed.scale, n) if by_group else packed.scale.reshape(-1, 1),
    }
    zero = packed._buffers.get("zero")
    return leaves if zero is None else {**leaves, "weight_zero": _by_row(zero, n)}


def linear(scheme: Scheme, x: Tensor, packed: Packed, bias: Tensor | None, gelu: bool) -> Tensor:
    """x [M, K], K maybe shorter than what packed groups fill: [M, N] in the dtype of x."""
    spec = scheme.weight
    assert spec is not None
    zero = packed._buffers.get("zero")
    group = spec.size if spec.granularity == "group" else 0
    rows = x if x.dtype in ops.DTYPES else x.float()
    y = ops.weight_only(_bits(spec), rows, packed.n, x.shape[1], packed.weight, packed.scale, zero, group, bias, gelu)
    return y.to(x.dtype)


def _bits(spec: QSpec) -> int:
    """Bits of integer codes; 0: e4m3."""
    return 0 if spec.dtype == "fp8" else int(spec.bits or 8)


def _codes(spec: QSpec, weight: Tensor) -> Tensor:
    """uint8 [N, K]: bits of e4m3 codes; of 8 bits signed integers; else codes from 0."""
    if not spec.is_integer:
        return weight.view(torch.uint8)
    codes = unpack_integers(weight, spec)
    return codes ^ 128 if spec.dtype == "int8" else codes


def _stored(spec: QSpec, codes: Tensor) -> Tensor:
    """What `_codes` was given."""
    if not spec.is_integer:
        return codes.view(torch.float8_e4m3fn if spec.dtype == "fp8" else torch.int8)
    return pack_integers(codes ^ 128 if spec.dtype == "int8" else codes, spec)


def _panels(codes: Tensor, multiple: int) -> Tensor:
    """[N, K] -> [panels, K/2, 128], filled up with zeros: each step has two input channels of 64 output channels."""
    filled = F.pad(codes, (0, -codes.shape[1] % multiple, 0, -codes.shape[0] % PANEL))
    return filled.view(-1, PANEL, filled.shape[1] // 2, 2).transpose(1, 2).flatten(2).contiguous()


def _squeeze(steps: Tensor, bits: int) -> Tensor:
    """Codes of `bits` [..., 128] -> bytes [..., 128 * bits / 8]: byte j has code j, and those so many bytes further."""
    parts = steps.chunk(8 // bits, dim=-1)
    out = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        out |= part << (bits * index)
    return out


def _spread(packed: Tensor, bits: int) -> Tensor:
    """What `_squeeze` was given."""
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


def _by_panel(scales: Tensor) -> Tensor:
    """[N, G] -> [panels, G, 64], filled up with zeros."""
    filled = F.pad(scales.float(), (0, 0, 0, -scales.shape[0] % PANEL))
    return filled.view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()


def _by_row(panels: Tensor, n: int) -> Tensor:
    """What `_by_panel` was given."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:n].contiguous()
