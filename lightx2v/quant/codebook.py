"""Four-bit weights that number the values of a table: NF4 and FP4, as bitsandbytes has them (arXiv 2305.14314).

value = table[code] * scale, scale the largest absolute value of 64 values of a row. `_double`: the scales of the whole
weight, less their mean, are themselves codes of a table of 256 values, under one scale for 256 of them. N rows, K
columns, G blocks of a row, K filled up with zeros. Two codes in a byte, the first in the low half.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.quant.blocks import by_rows, fill_up
from lightx2v.quant.minifloat import lookup_pairs
from lightx2v.quant.packing import pack4
from lightx2v.quant.spec import QSpec

NESTED_BLOCK = 256
"""Scales under one scale of their own."""
# fmt: off
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
_FP4_HALF = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4_VALUES = (*_FP4_HALF, *(-value for value in _FP4_HALF))


def values_of(spec: QSpec) -> tuple[float, ...]:
    """The sixteen values of the codes."""
    return NF4_VALUES if spec.dtype.startswith("nf4") else FP4_VALUES


def is_double(spec: QSpec) -> bool:
    """Whether the scales are quantized as well."""
    return spec.dtype.endswith("_double")


def codebook_leaves(weight: Tensor, spec: QSpec) -> dict[str, Tensor]:
    """The tensors of a float weight [N, K]. A block of zeros has scale 0, one with an inf or NaN such a scale."""
    table, order = _sorted_table(spec, weight.device)
    middles = (table[1:] + table[:-1]) / 2

    def make(slab: Tensor) -> tuple[Tensor, Tensor]:
        groups = fill_up(slab.float(), spec).unflatten(1, (-1, spec.size))
        scale = groups.abs().amax(dim=2)
        scaled = groups / torch.where(scale == 0, 1.0, scale).unsqueeze(2)
        return pack4(order[torch.bucketize(scaled, middles)].flatten(1)), scale

    codes, scale = by_rows(weight, make)
    return {"weight": codes, **(quantize_scales(scale) if is_double(spec) else {"weight_scale": scale})}


def codebook_values(
    leaves: Mapping[str, Tensor], spec: QSpec, dtype: torch.dtype = torch.float32, rows: tuple[int, int] | None = None
) -> Tensor:
    """The weight [N, K] of such tensors, or its rows [start, stop); K filled up to whole blocks."""
    start, stop = rows or (0, leaves["weight"].shape[0])
    scale = block_scales(leaves, start, stop) if is_double(spec) else leaves["weight_scale"][start:stop]
    values = lookup_pairs(leaves["weight"][start:stop], values_of(spec), torch.float32)
    return values.unflatten(1, (-1, spec.size)).mul_(scale.unsqueeze(2)).flatten(1).to(dtype)


def quantize_scales(scale: Tensor) -> dict[str, Tensor]:
    """Scales [N, G] as `weight_scale` uint8 [N, G], `weight_scale_map` [256], `weight_scale_absmax` [ceil(NG / 256)]
    and `weight_scale_offset` []."""
    table = dynamic_map(scale.device)
    offset = scale.mean()
    flat = (scale - offset).flatten()
    blocks = F.pad(flat, (0, -flat.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return {
        "weight_scale": codes.flatten()[: flat.numel()].view(scale.shape),
        "weight_scale_map": table,
        "weight_scale_absmax": absmax,
        "weight_scale_offset": offset,
    }


def block_scales(leaves: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the scales [N, G] that `quantize_scales` made codes of."""
    codes = leaves["weight_scale"][start:stop]
    number = torch.arange(start * codes.shape[1], stop * codes.shape[1], device=codes.device).view(codes.shape)
    absmax = leaves["weight_scale_absmax"][number // NESTED_BLOCK]
    return leaves["weight_scale_map"][codes.int()] * absmax + leaves["weight_scale_offset"]


@lru_cache(maxsize=4)
def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic 8-bit values, float32 [256] in rising order (arXiv 1511.04561, 2110.02861).

    Each of seven decades 10^(e-6) has 2^e values on either side, at the middles of equal parts of [0.1, 1]; 0 and 1
    make up the 256.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive = ((edges[1:] + edges[:-1]) / 2 * 10 ** (exponent - 6)).tolist()
        found += [*positive, *(-value for value in positive)]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


def _sorted_table(spec: QSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values in rising order, and the code of each, uint8."""
    table = torch.tensor(values_of(spec), dtype=torch.float32, device=device)
    order = table.argsort(stable=True)
    return table[order], order.to(torch.uint8)
