"""Codes of a solved weight bettered one column at a time, and scales fitted to the codes, in turns.

The output error of a weight W [N, K] rounded to Q is tr((W - Q) H (W - Q)^T) with H = X^T X of the inputs X. Of one
column, with all others as they are, the best codes have a closed form, as have the scales and zero points under given
codes: linear least squares with 2 G unknowns in each row. Coordinate descent for codes is that of QuantEase (arXiv
2309.01885). N output channels, K input channels, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.quant.calibration.grids import Groups, IntegerGrid

_SMALLEST = 1e-8
"""Of a scale's size; below, codes would be of no use."""


def descend(weight: Tensor, gram: Tensor, groups: Groups, grid: IntegerGrid, *, rounds: int = 6) -> Groups:
    """Codes and scales whose error is at most that of `groups`, for a weight [N, K] and the gram H [K, K].

    The grid has zero points, which with the scales become any numbers, as Quanto's and HQQ's are; H is positive
    definite (add damping first). A round is one fit of the scales, kept in the rows that it betters, and two passes
    over the columns. Raises LightX2VError for a symmetric grid.
    """
    if groups.zero is None:
        raise LightX2VError("calibration", "descent needs a grid with zero points", allowed="int<bits>-g<size>-asym")
    weight, gram = weight.float(), gram.float()
    k, width = weight.shape[1], grid.size or weight.shape[1]
    group_of = torch.arange(k, device=weight.device) // width
    codes, scale = groups.codes.float(), groups.scale
    low = -groups.zero * scale
    for _ in range(rounds):
        fitted = _fit(weight, gram, codes, group_of)
        better = _errors(weight, gram, codes, *fitted, group_of) < _errors(weight, gram, codes, scale, low, group_of)
        better = (better & (fitted[0].abs().amin(1) > _SMALLEST))[:, None]  # a NaN is not better
        scale, low = torch.where(better, fitted[0], scale), torch.where(better, fitted[1], low)
        codes = _columns(weight, gram, codes, scale[:, group_of], low[:, group_of], 2**grid.bits - 1)
    return Groups(codes.to(torch.uint8), scale, -low / scale)


def _errors(weight: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, low: Tensor, group_of: Tensor) -> Tensor:
    """The output error [N] of each row."""
    off = codes * scale[:, group_of] + low[:, group_of] - weight
    return ((off @ gram) * off).sum(dim=1)


def _fit(weight: Tensor, gram: Tensor, codes: Tensor, group_of: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and the least values, [N, G] each, of least error under these codes."""
    count = int(group_of[-1]) + 1
    ones = torch.nn.functional.one_hot(group_of, count).T.to(weight.dtype)  # [G, K]
    basis = torch.cat((ones * codes[:, None], ones.expand(len(codes), -1, -1)), dim=1)  # [N, 2 G, K]
    through = basis @ gram
    normal = through @ basis.transpose(1, 2)
    normal = normal + torch.diag_embed(1e-7 * normal.diagonal(dim1=1, dim2=2) + 1e-12)  # codes may be all alike
    found = torch.linalg.solve(normal, through @ weight[:, :, None]).squeeze(2)
    return found[:, :count], found[:, count:]


def _columns(weight: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, low: Tensor, top: int) -> Tensor:
    """Codes [N, K] after two passes over the columns, under scales and least values [N, K]."""
    codes, scale, low = (part.T.contiguous().clone() for part in (codes, scale, low))  # [K, N]: a column is a row
    values = codes * scale + low
    slope = gram @ (values - weight.T)
    diagonal = gram.diagonal().tolist()
    for column in 2 * sorted(range(len(diagonal)), key=diagonal.__getitem__):
        best = (values[column] - slope[column] / diagonal[column] - low[column]) / scale[column]
        best = best.round_().clamp_(0, top)
        change = (best - codes[column]) * scale[column]
        codes[column] = best
        values[column] += change
        slope.addr_(gram[column], change)
    return codes.T.contiguous()
