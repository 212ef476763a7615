"""Half-quadratic quantization (HQQ, https://mobiusml.github.io/hqq_blog): zero points that suit most values of a group.

The sum of |error|^p with p < 1 cares little about a few large errors, of outliers, and much about the many small ones.
Without any data: only the weight is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.quant.calibration.grids import Groups, IntegerGrid, Scales, by_groups

_SMALLEST = torch.finfo(torch.float32).tiny


def hqq(
    weight: Tensor,
    bits: int,
    size: int,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> Groups:
    """A weight [N, K] of any float dtype as codes of 1 to 8 bits in groups of `size` (0: a row), zero any float.

    Scales are those of `IntegerGrid(bits, size, symmetric=False)`; so is the first zero point, and of the `iterations`
    after it each group keeps the one of least mean |error|^p. An iteration parts the error E = W - W' into what is
    shrunk, E' = sign(E) max(|E| - |E|^(p-1) / beta, 0), and what the next zero point, mean(code - (W - E') / scale),
    makes up for; beta grows by `kappa`.
    """
    grid = IntegerGrid(bits, size, symmetric=False)

    def solve(rows: Tensor) -> tuple[Tensor, Scales]:
        scales = _zero_points(rows, grid, p, beta, kappa, iterations)
        return grid.encode(rows, scales), scales

    return by_groups(weight, size, solve)


def _zero_points(rows: Tensor, grid: IntegerGrid, p: float, beta: float, kappa: float, iterations: int) -> Scales:
    """Scales [R, 1] and the best zero points [R, 1] of the groups [R, C]."""
    scale, zero = grid.fit(rows)
    assert zero is not None
    best, least = zero, torch.full_like(zero, torch.inf)
    for step in range(iterations + 1):
        tried = Scales(scale, zero)
        codes = grid.encode(rows, tried)
        error = rows - grid.decode(codes, tried)
        size = error.abs()
        powered = size.pow(p)
        norm = powered.mean(dim=1, keepdim=True)
        better = norm < least
        best, least = torch.where(better, zero, best), torch.minimum(norm, least)
        if step == iterations:
            break
        shrunk = error.sign() * (size - powered / size.clamp(min=_SMALLEST) / beta).clamp_(min=0)
        zero = (codes.float() - (rows - shrunk) / scale).mean(dim=1, keepdim=True)
        beta *= kappa
    return Scales(scale, best)
