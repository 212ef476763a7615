"""What a library of kernels promises, on any device: codes and scales bit for bit, products within caps.rtol."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightx2v.mm.base import Library
from lightx2v.mm.scheme import Scheme
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.numerics import Quantized, dequantize_weight, quantize_activation, rounding_of

_ROWS = 64
"""Rows of a product that are compared with float64, spread over all of them."""


@dataclass(frozen=True)
class Case:
    """One layer [n, k] on m tokens."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    bias: bool


def check_library(library: Library, scheme: Scheme, case: Case, device: torch.device) -> None:
    """Quantize tokens and multiply them by a random weight, both by `library` on `device`."""
    assert scheme.weight is not None
    generator = torch.Generator().manual_seed(case.m + case.n)
    leaves = quantize_leaves(torch.randn(case.n, case.k, generator=generator) * 0.05, scheme.weight)
    x = torch.randn(case.m, case.k, generator=generator)
    x[:: max(case.m // 3, 1)] *= 40  # tokens of different size
    x[case.m // 2] = 0
    x = x.to(case.dtype)
    # Numbers that float16 and bfloat16 hold exactly: a library may round the bias before it adds it.
    bias = (torch.arange(case.n) % 255 - 127).float() / 16 if case.bias else None

    packed = library.prepare(scheme, {leaf: tensor.to(device) for leaf, tensor in leaves.items()})
    codes = library.quantize(scheme, x.to(device), packed)
    check_codes(scheme, x, Quantized(codes.codes.cpu(), codes.scale.cpu()))
    result = library.gemm(scheme, codes, packed, None if bias is None else bias.to(device), case.dtype)
    check_product(library, scheme, codes, leaves, bias, result, case)


def check_codes(scheme: Scheme, x: Tensor, got: Quantized) -> None:
    """Bit-equal to the emulation of the library that the scheme names; a zero scale makes codes meaningless."""
    assert scheme.activation is not None
    wanted = quantize_activation(x, scheme.activation, rounding_of(scheme.act_library, scheme.activation))
    assert got.scale.shape == wanted.scale.shape and got.codes.dtype == wanted.codes.dtype
    unequal = int((got.scale != wanted.scale).sum())
    assert unequal == 0, f"{unequal} of {wanted.scale.numel()} scales differ"
    width = scheme.activation.size or x.shape[1]
    counts = (wanted.scale != 0).repeat_interleave(width, dim=1)[:, : x.shape[1]]
    differ = int(((got.codes[:, : x.shape[1]].float() != wanted.codes.float()) & counts).sum())
    assert differ == 0, f"{differ} of {wanted.codes.numel()} codes differ"


def check_product(
    library: Library,
    scheme: Scheme,
    codes: Quantized,
    leaves: dict[str, Tensor],
    bias: Tensor | None,
    result: Tensor,
    case: Case,
) -> None:
    """Within caps.rtol of the float64 product of the same codes; int8 to the rounding of the result."""
    assert scheme.weight is not None and scheme.activation is not None
    assert result.shape == (case.m, case.n) and result.dtype == case.dtype and bool(result.isfinite().all())
    rows = torch.arange(0, case.m, max(case.m // _ROWS, 1))
    width = scheme.activation.size or case.k
    scale = codes.scale.cpu()[rows].double().repeat_interleave(width, dim=1)[:, : case.k]
    values = codes.codes.cpu()[rows][:, : case.k].double() * scale
    weight = dequantize_weight(leaves["weight"], leaves["weight_scale"], scheme.weight).double()
    exact = values @ weight.t() + (0 if bias is None else bias.double())
    size = values.abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    caps = library.caps
    rounded = case.dtype if case.dtype in caps.out_dtypes else torch.bfloat16
    eps = max(torch.finfo(case.dtype).eps, torch.finfo(rounded).eps)
    # Scales and the bias round a few times in float32 even where the accumulation is exact.
    rtol = 2.0**-21 if scheme.weight.dtype in caps.exact else caps.bound(scheme)
    excess = (result.cpu()[rows].double() - exact).abs() - (size * rtol + exact.abs() * eps + torch.finfo(rounded).tiny)
    assert excess.max() <= 0, (
        f"{int((excess > 0).sum())} of {excess.numel()} results are off, by up to {excess.max():.3g}"
    )
