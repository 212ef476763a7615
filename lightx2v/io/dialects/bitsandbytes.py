"""State dicts of bitsandbytes' 4-bit and 8-bit linears (https://github.com/bitsandbytes-foundation/bitsandbytes, 0.50).

    <layer>.weight                                     codes of 4 bits, the first of two in the high half, as any dtype
    <layer>.weight.absmax                              float32, or uint8 when it is quantized as well, [blocks]
    <layer>.weight.quant_map                           float32 [16], the values of the codes
    <layer>.weight.nested_absmax, .nested_quant_map    of a quantized absmax
    <layer>.weight.quant_state.bitsandbytes__<kind>    uint8: JSON of blocksize, shape and the rest
    <layer>.weight, <layer>.SCB, .weight_format        LLM.int8: int8 [N, K]; value = code * SCB / 127

Blocks are of the weight in one row after the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import Found, Translation
from lightx2v.quant.codebook import FP4_VALUES, NESTED_BLOCK, NF4_VALUES, block_scales
from lightx2v.quant.packing import swap_halves

_STATE = ".weight.quant_state.bitsandbytes__"
_TABLES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
_BLOCK = 64
_INT8_SCALE = ".SCB"
_LEVELS = 127
_ROW_MAJOR = 0
"""`weight_format` of codes as they are; the others are orders of old GPUs."""
_INT8_TYPES = {6.0: "llm-int8", 0.0: "int8"}
"""By the threshold of columns that stay floats; 0: none do."""


class BitsAndBytes:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        return any(_STATE in name or name.endswith(_INT8_SCALE) for name in found.tensors)

    def translate(self, found: Found) -> Translation:
        """NF4 and FP4 with their own scales, quantized ones as they are where no layers are put together; LLM.int8."""
        translation = Translation(found)
        for name, text in found.load([name for name in found.tensors if _STATE in name]).items():
            _four_bits(translation, _read_state(found, name, text))
        formats = found.load([name for name in found.tensors if name.endswith(".weight_format")])
        for layer in found.ending(_INT8_SCALE):
            _eight_bits(translation, layer, formats)
        return translation


DIALECT = BitsAndBytes()


@dataclass(frozen=True)
class _State:
    """A layer of 4-bit codes. `size` values are under one scale; `offset` is None where scales are float32."""

    found: Found
    layer: str
    kind: str
    n: int
    k: int
    size: int
    offset: float | None

    @property
    def weight(self) -> str:
        return f"{self.layer}.weight"

    @property
    def table(self) -> str:
        return f"{self.weight}.quant_map"

    @property
    def scales(self) -> tuple[str, ...]:
        """The tensors that the scales are in."""
        nested = (f"{self.weight}.nested_absmax", f"{self.weight}.nested_quant_map")
        return (f"{self.weight}.absmax", *(() if self.offset is None else nested))

    def codes(self, given: Given) -> Tensor:
        """uint8 [N * K / 2], the first of two codes in the low half."""
        wanted = torch.tensor(_TABLES[self.kind])
        if not torch.allclose(given[self.table].float(), wanted, atol=1e-6):
            raise self.found.refuse(f"'{self.table}' holds other values than those of {self.kind}")
        return swap_halves(given[self.weight].contiguous().view(torch.uint8).reshape(-1))

    def values(self, given: Given) -> Tensor:
        """float32 scales of each 64 values of the flattened weight."""
        absmax = given[self.scales[0]]
        if self.offset is not None:
            leaves = {
                "weight_scale": absmax.view(1, -1),
                "weight_scale_map": given[self.scales[2]].float(),
                "weight_scale_absmax": given[self.scales[1]].float(),
                "weight_scale_offset": torch.tensor(self.offset),
            }
            absmax = block_scales(leaves, 0, 1).view(-1)
        return absmax.float().repeat_interleave(self.size // _BLOCK)[: -(-self.n * self.k // _BLOCK)]

    def floats(self, given: Given) -> Tensor:
        """float32 [N, K]."""
        packed = self.codes(given)
        picked = torch.stack((packed & 15, packed >> 4), dim=1).flatten().int()
        values = torch.tensor(_TABLES[self.kind])[picked]
        return (values * self.values(given).repeat_interleave(_BLOCK)[: values.numel()]).view(self.n, self.k)


def _read_state(found: Found, name: str, text: Tensor) -> _State:
    layer, _, kind = name.partition(_STATE)
    try:
        said = json.loads(bytes(text.tolist()))
        n, k = said["shape"]
        size, nested = said["blocksize"], said.get("nested_blocksize")
        offset = None if nested is None else float(said["nested_offset"])
    except (ValueError, TypeError, KeyError) as error:
        raise found.refuse(f"'{name}' does not describe a weight [N, K]: {error!r}") from error
    if kind not in _TABLES or said.get("quant_type") != kind:
        raise found.refuse(f"'{name}' says type {said.get('quant_type')!r}", ", ".join(_TABLES))
    if size % _BLOCK or nested not in (None, NESTED_BLOCK):
        raise found.refuse(
            f"'{name}' says blocks of {size}, and of {nested} scales", f"multiples of {_BLOCK}, and {NESTED_BLOCK}"
        )
    state = _State(found, layer, kind, n, k, size, offset)
    blocks = -(-n * k // size)
    counts = {state.table: 16, state.scales[0]: blocks}
    if offset is not None:
        counts |= {state.scales[1]: -(-blocks // NESTED_BLOCK), state.scales[2]: 256}
    for part in (state.weight, *counts):
        if part not in found.tensors:
            raise found.refuse(f"'{part}' is missing", do="check that the file is whole")
        if part in counts and found.tensors[part].shape != (counts[part],):
            raise found.refuse(f"'{part}' has shape {list(found.tensors[part].shape)}, wanted is {[counts[part]]}")
    if 2 * found.tensors[state.weight].nbytes != n * k:
        raise found.refuse(f"'{state.weight}' has {found.tensors[state.weight].nbytes:,} bytes for a weight {[n, k]}")
    return state


def _four_bits(translation: Translation, state: _State) -> None:
    n, k, layer = state.n, state.k, state.layer
    needs = (state.weight, state.table, *state.scales)
    translation.take(f"{layer}{_STATE}{state.kind}", *needs)
    if k % _BLOCK:  # blocks go over the ends of rows, which no layer here computes with
        translation.floats(layer, Made(needs, state.floats, "F32", (n, k)))
        return
    packed = Made(needs[:2], lambda given: state.codes(given).view(n, k // 2), "U8", (n, k // 2))
    groups = k // _BLOCK
    if state.offset is not None and state.size == _BLOCK and translation.found.wanted.whole:
        absmax, offset = state.scales[0], torch.tensor(state.offset)
        leaves = {
            "weight": packed,
            "weight_scale": Made((absmax,), lambda given: given[absmax].view(n, groups), "U8", (n, groups)),
            "weight_scale_map": translation.same(state.scales[2]),
            "weight_scale_absmax": translation.same(state.scales[1]),
            "weight_scale_offset": Made((), lambda given: offset, "F32", ()),
        }
        translation.layer(layer, f"{state.kind}-double", leaves, n, k)
        return
    scale = Made(state.scales, lambda given: state.values(given).view(n, groups), "F32", (n, groups))
    translation.layer(layer, state.kind, {"weight": packed, "weight_scale": scale}, n, k)


def _eight_bits(translation: Translation, layer: str, formats: Given) -> None:
    found, name, scale, order = translation.found, f"{layer}.weight", f"{layer}{_INT8_SCALE}", f"{layer}.weight_format"
    info = found.tensors.get(name)
    if info is None or info.dtype != "I8" or len(info.shape) != 2:
        raise found.refuse(f"'{scale}' has no int8 weight '{name}' beside it", do="check that the file is whole")
    if order in formats and int(formats[order]) != _ROW_MAJOR:
        raise found.refuse(
            f"'{order}' is {int(formats[order])}, an order of codes for certain GPUs",
            f"{_ROW_MAJOR}, rows",
            "save the model again with a newer bitsandbytes",
        )
    threshold = float(found.config.get("llm_int8_threshold", 6.0))
    if threshold not in _INT8_TYPES:
        raise found.refuse(f"config.json says llm_int8_threshold {threshold:g}", "6, or 0")
    n, k = info.shape
    if found.tensors[scale].shape != (n,):
        raise found.refuse(f"'{scale}' has shape {list(found.tensors[scale].shape)}, wanted is {[n]}")
    translation.take(*({order} & formats.keys()))
    leaves = {
        "weight": translation.same(name),
        "weight_scale": Made((scale,), lambda given: given[scale].float().view(n, 1) / _LEVELS, "F32", (n, 1)),
    }
    translation.layer(layer, _INT8_TYPES[threshold], leaves, n, k)
