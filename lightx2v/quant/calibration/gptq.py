"""GPTQ (arXiv 2210.17323): column after column is rounded, and the columns still to come take up its error.

The output error of a weight W rounded to Q is tr((W - Q) X^T X (W - Q)^T) for inputs X, so all that is needed of them
is the sum X^T X. N output channels, K input channels, G groups of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.quant.calibration.grids import Grid, Groups, Scales, group_rows

_LARGEST_DAMP = 1e3


def gptq(
    weight: Tensor, gram: Tensor, grid: Grid, *, damp: float = 0.01, block: int = 128, act_order: bool = False
) -> Groups:
    """Codes and scales of a weight [N, K] of any float dtype, from the sum `gram` [K, K] of x^T x of its inputs.

    `damp` times the mean of the diagonal is added to it, and ten times as much again for as long as it is not positive
    definite. Errors are passed on at once within `block` columns, and to the others after each block. A group's scale
    is fitted when its first column is due, to the values as they are then; with `act_order`, which takes the columns of
    the largest inputs first, to the values as given. A channel whose inputs were all zero is rounded to nearest and
    passes nothing on. Raises LightX2VError for a gram with inf or NaN.
    """
    n, k = weight.shape
    width = grid.size or k
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
    inverse = _inverse_factor(gram if order is None else gram[order][:, order], damp)
    columns = weight.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # [K, N]: a column is a row
    scales = _all_scales(columns, grid) if act_order else None
    if order is not None:
        columns = columns[order]
    numbers = order if order is not None else torch.arange(k, device=weight.device)
    group_of = (numbers // width).tolist()
    if width < k and not act_order:
        block = width * max(1, block // width)  # a group's columns are whole when it is fitted
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    fitted: list[Scales] = [] if scales is None else scales
    for start in range(0, k, block):
        stop = min(start + block, k)
        within = inverse[start:stop, start:stop]
        errors = torch.empty(stop - start, n, device=weight.device)
        for i, column in enumerate(range(start, stop)):
            group = group_of[column]
            if group == len(fitted):
                fitted.append(_fit(columns[column : column + width], grid))
            values = columns[column]
            codes[column] = grid.encode(values, fitted[group])
            errors[i] = (values - grid.decode(codes[column], fitted[group])) / within[i, i]
            columns[column:stop].addr_(within[i, i:], errors[i], alpha=-1)
        columns[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        codes = codes[order.argsort()]
    scale = torch.stack([each.scale for each in fitted], dim=1)
    zeros = [each.zero for each in fitted if each.zero is not None]
    return Groups(codes.T.contiguous(), scale, torch.stack(zeros, dim=1) if zeros else None)


def _fit(columns: Tensor, grid: Grid) -> Scales:
    """Scales [N] of one group, columns [C, N], filled up with zeros where it is the last of a row and a part."""
    rows = columns.T
    if grid.size:
        rows = F.pad(rows, (0, grid.size - rows.shape[1]))
    scales = grid.fit(rows)
    return Scales(scales.scale.squeeze(1), None if scales.zero is None else scales.zero.squeeze(1))


def _all_scales(columns: Tensor, grid: Grid) -> list[Scales]:
    """Scales [N] of each group, of columns [K, N] in their own order."""
    scales = grid.fit(group_rows(columns.T, grid.size))
    scale = scales.scale.view(columns.shape[1], -1).unbind(1)
    if scales.zero is None:
        return [Scales(each, None) for each in scale]
    return list(map(Scales, scale, scales.zero.view(columns.shape[1], -1).unbind(1)))


def _inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """The upper triangular U with U^T U = (gram + damping)^-1, float32 [K, K]."""
    if not bool(gram.isfinite().all()):
        raise LightX2VError("calibration", "the inputs' second moments hold inf or NaN", do="calibrate again")
    gram = gram.float().clone()
    diagonal = gram.diagonal()
    diagonal[diagonal <= 0] = 1.0  # of channels that were always zero, as are their rows and columns
    added = damp * float(diagonal.mean())
    while added <= _LARGEST_DAMP * float(diagonal.mean()):
        diagonal += added
        # Flipped in both dimensions: the lower factor L of that, flipped, is an upper R with R R^T = gram, so U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not int(failed):
            eye = torch.eye(len(gram), device=gram.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        added = 10 * max(added, 1e-6 * float(diagonal.mean()))
    raise LightX2VError("calibration", "the inputs' second moments have no inverse", do="calibrate with more prompts")
