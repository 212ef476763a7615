"""One linear as SVDQuant's and AWQ's kernels of nunchaku have it in memory, put back into rows and columns.

Rows N and columns K are multiples of 128, ranks R of 16:

    qweight                int8 [N, K / 2]: codes of 4 bits, two's complement or e2m1, in the fragments of m16n8k64
    wscales                16-bit floats [K / 64, N], or e4m3 [K / 16, N] of nvfp4
    wcscales, wtscale      of nvfp4: further factors, per row [N] and of the tensor [1]
    smooth_factor          [K]: the input is divided by it and quantized; `smooth` in files of FLUX
    proj_down, proj_up     [K, R], [N, R]: the low-rank branch of the input itself; there `lora_down`, `lora_up`
    bias                   [N], in the order of scales
    qweight, wscales, wzeros   int32 [N / 4, K / 2] and [K / 64, N]: AWQ; value = code * scale + zero

The orders are those of `NunchakuWeightPacker` and `pack_w4` (https://github.com/nunchaku-tech/deepcompressor).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import Found
from lightx2v.quant.packing import pack4, swizzle, swizzled_shape

CODES = "qweight"
DO = "make the weights here: calibration with smooth 'svdquant' of the unquantized model"
_OLD = {"smooth_factor": "smooth", "smooth_factor_orig": "smooth_orig", "proj_down": "lora_down", "proj_up": "lora_up"}
_LEAVES = (CODES, "wscales", "wcscales", "wtscale", "bias", *_OLD)
_AWQ_LEAVES = (CODES, "wscales", "wzeros", "bias")
_TILE, _RANKS, _GROUP, _BLOCK = 128, 16, 64, 16
_FLOATS = ("F16", "BF16")


class _Order(NamedTuple):
    """How a tensor is stored: the sizes of the indices within a tile, and the order of all in rows and columns."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def plain(self, stored: Tensor, outer: Sequence[int], shape: tuple[int, int]) -> Tensor:
        """`stored` in rows and columns. `outer` are the counts of tiles, which come first."""
        return stored.reshape(*outer, *self.sizes).permute(self.order).reshape(shape)


# Lanes of a warp hold 8 rows times 4 runs of columns; the indices after the tiles are in the order of the memory.
_PACKED = _Order((8, 8, 4, 2, 2, 4), (0, 2, 5, 3, 1, 6, 4, 7))
_SCALES = _Order((8, 4, 2, 2), (0, 2, 4, 3, 5, 1))
_MICRO_SCALES = _Order((8, 4, 4, 4), (0, 4, 3, 2, 1, 5))
DOWN = _Order((8, 4, 2, 2, 2), (1, 4, 2, 0, 5, 3, 6))
_UP = _Order((8, 4, 2, 2, 2), (0, 4, 2, 1, 5, 3, 6))
_AWQ = _Order((4, 2, 8, 4), (0, 2, 1, 3, 5, 4))


@dataclass(frozen=True)
class Linear:
    """A quantized weight [n, k] in the tensors of `quant.layouts`, and its bias [n]."""

    mm_type: str
    n: int
    k: int
    leaves: dict[str, Made]
    bias: Made | None


@dataclass(frozen=True)
class PackedLayer:
    """One quantized linear of a file."""

    found: Found
    layer: str

    def refuse(self, what: str, allowed: str = "") -> CheckpointError:
        return self.found.refuse(f"'{self.layer}' {what}", allowed, DO)

    def stored(self, leaf: str) -> str:
        """The name of a tensor in the file, there or not."""
        name, old = f"{self.layer}.{leaf}", f"{self.layer}.{_OLD.get(leaf, leaf)}"
        return old if old in self.found.tensors else name

    def has(self, leaf: str) -> bool:
        return self.stored(leaf) in self.found.tensors

    @property
    def names(self) -> list[str]:
        """Those of all its tensors."""
        return [name for name in self.found.tensors if name.startswith(f"{self.layer}.")]

    def name(self, leaf: str, shape: tuple[int, ...], dtypes: Sequence[str] = _FLOATS) -> str:
        """The tensor of a leaf, once it is seen that it has that shape and one of the dtypes."""
        if not self.has(leaf):
            raise self.refuse(f"lacks '{leaf}'")
        info = self.found.tensors[self.stored(leaf)]
        if info.shape != shape or info.dtype not in dtypes:
            wanted = f"{' or '.join(dtypes)} {list(shape)}"
            raise self.refuse(f"has a '{leaf}' {info.dtype} {list(info.shape)}", wanted)
        return info.name

    def read(self, rows: slice = slice(None)) -> Linear:
        """The layer, of which only `rows` are to be used: other rows may have other factors of nvfp4."""
        if not self.has(CODES):
            raise self.refuse(f"lacks '{CODES}'")
        info = self.found.tensors[f"{self.layer}.{CODES}"]
        known = _AWQ_LEAVES if info.dtype == "I32" else (*_LEAVES, *_OLD.values())
        leaves = [name.removeprefix(f"{self.layer}.") for name in self.names]
        if unknown := [leaf for leaf in leaves if leaf not in known]:
            raise self.refuse(f"has a '{unknown[0]}'", ", ".join(known))
        if info.dtype == "I32" and len(info.shape) == 2:
            return self._awq(4 * info.shape[0], 2 * info.shape[1])
        n, k = (info.shape[0], 2 * info.shape[1]) if len(info.shape) == 2 else (0, 0)
        if info.dtype != "I8" or n % _TILE or k % _TILE or not n * k:
            raise self.refuse(
                f"has a '{CODES}' {info.dtype} {list(info.shape)}", "I8 [N, K / 2] or I32 [N / 4, K / 2], N and K 128n"
            )
        kind = self.found.tensors[f"{self.layer}.wscales"].dtype if self.has("wscales") else "no scale"
        bias = self._channels("bias", n) if self.has("bias") else None
        if kind == "F8_E4M3":
            return Linear("nvfp4", n, k, {**self._nvfp4(n, k, rows), **self._around(n, k)}, bias)
        return Linear("int4-w4a4", n, k, {**self._int4(n, k), **self._around(n, k)}, bias)

    def _codes(self, n: int, k: int, flip: int) -> Made:
        name = f"{self.layer}.{CODES}"

        def make(given: Given) -> Tensor:
            tiles = (n // _TILE, k // _GROUP)
            return _PACKED.plain(given[name].contiguous().view(torch.uint8), tiles, (n, k // 2)) ^ flip

        return Made((name,), make, "U8", (n, k // 2))

    def _int4(self, n: int, k: int) -> dict[str, Made]:
        if other := [leaf for leaf in ("wcscales", "wtscale") if self.has(leaf)]:
            raise self.refuse(f"of int4 has a '{other[0]}'")
        groups = k // _GROUP
        scale = self.name("wscales", (groups, n))

        def scales(given: Given) -> Tensor:
            return _SCALES.plain(given[scale].float(), (n // _TILE, groups), (n, groups))

        # Codes are from -8 there and from 0 here: the sign of both in a byte turns.
        return {"weight": self._codes(n, k, 0x88), "weight_scale": Made((scale,), scales, "F32", (n, groups))}

    def _nvfp4(self, n: int, k: int, rows: slice) -> dict[str, Made]:
        groups = k // _BLOCK
        scale = self.name("wscales", (groups, n), ("F8_E4M3",))
        of_rows = (self.name("wcscales", (n,)),) if self.has("wcscales") else ()
        whole = (self._scalar("wtscale"),) if self.has("wtscale") else ()

        def scales(given: Given) -> Tensor:
            stored = given[scale].contiguous().view(torch.uint8)
            plain = _MICRO_SCALES.plain(stored, (n // _TILE, k // _GROUP), (n, groups))
            return swizzle(plain.contiguous().view(torch.float8_e4m3fn))

        def divisor(given: Given) -> Tensor:
            factor = torch.ones((), dtype=torch.float64)
            for name in (*of_rows, *whole):
                values = given[name].double().flatten()
                values = values[rows] if name in of_rows else values
                if bool((values != values[0]).any()):
                    raise self.refuse("has 'wcscales' that differ between rows", "one factor for all, as of one linear")
                factor = factor * values[0]
            return factor.reciprocal().float()

        one = torch.ones(())
        return {
            "weight": self._codes(n, k, 0),
            "weight_scale": Made((scale,), scales, "F8_E4M3", swizzled_shape(n, groups)),
            "weight_global_scale": Made((*of_rows, *whole), divisor, "F32", ()),
            "input_global_scale": Made((), lambda given: one, "F32", ()),
        }

    def _scalar(self, leaf: str) -> str:
        name = self.stored(leaf)
        if math.prod(shape := self.found.tensors[name].shape) != 1:
            raise self.refuse(f"has a '{leaf}' {list(shape)}", "one number")
        return name

    def _channels(self, leaf: str, size: int) -> Made:
        """A vector over rows or columns, in its own dtype."""
        name = self.name(leaf, (size,))

        def make(given: Given) -> Tensor:
            return _SCALES.plain(given[name], (size // _TILE, 1), (size, 1)).reshape(size)

        return Made((name,), make, self.found.tensors[name].dtype, (size,))

    def _around(self, n: int, k: int) -> dict[str, Made]:
        smooth = self._channels("smooth_factor", k)
        made = {
            "input_multiplier": smooth._replace(make=lambda given: smooth.make(given).float().reciprocal(), dtype="F32")
        }
        if not self.has("proj_down") and not self.has("proj_up"):
            return made
        shape = self.found.tensors[self.stored("proj_down" if self.has("proj_down") else "proj_up")].shape
        ranks = shape[-1] if shape and shape[-1] % _RANKS == 0 else 0
        if not ranks:
            raise self.refuse(f"has a low-rank branch {list(shape)}", "multiples of 16 ranks")
        down, up = self.name("proj_down", (k, ranks)), self.name("proj_up", (n, ranks))
        tiles = ranks // _RANKS

        def narrow(given: Given) -> Tensor:
            return DOWN.plain(given[down], (k // _RANKS, tiles), (ranks, k))

        def wide(given: Given) -> Tensor:
            return _UP.plain(given[up], (n // _RANKS, tiles), (n, ranks))

        made["lowrank_down"] = Made((down,), narrow, self.found.tensors[down].dtype, (ranks, k))
        made["lowrank_up"] = Made((up,), wide, self.found.tensors[up].dtype, (n, ranks))
        return made

    def _awq(self, n: int, k: int) -> Linear:
        groups = k // _GROUP
        stored = self.found.tensors[f"{self.layer}.wscales"].shape if self.has("wscales") else (groups, n)
        if k % _GROUP or len(stored) != 2 or stored[0] < groups:
            raise self.refuse(f"has 'wscales' {list(stored)} for a weight {[n, k]}", f"groups of {_GROUP} in columns")
        # Groups beyond those of the columns are zeros that fill up.
        scale, zero = self.name("wscales", (stored[0], n)), self.name("wzeros", (stored[0], n))
        packed = f"{self.layer}.{CODES}"

        def codes(given: Given) -> Tensor:
            # Four codes, 8 columns apart, are in a word of 16 bits, the first in the lowest.
            words = given[packed].contiguous().view(torch.int16).unsqueeze(-1)
            each = ((words >> torch.arange(0, 16, 4, dtype=torch.int16)) & 15).to(torch.uint8)
            return pack4(_AWQ.plain(each, (n // 4, k // _GROUP), (n, k)))

        def scales(given: Given) -> Tensor:
            return given[scale].float()[:groups].t()

        def zeros(given: Given) -> Tensor:
            over, shift = scales(given), given[zero].float()[:groups].t()
            if bool(((over == 0) & (shift != 0)).any()):
                raise self.refuse("has a 'wscales' of 0 under a 'wzeros' that is not")
            return torch.where(over == 0, 0, -shift / over)

        leaves = {
            "weight": Made((packed,), codes, "U8", (n, k // 2)),
            "weight_scale": Made((scale,), scales, "F32", (n, groups)),
            "weight_zero": Made((scale, zero), zeros, "F32", (n, groups)),
        }
        bias = None
        if self.has("bias"):
            stored_bias = self.name("bias", (n,), (*_FLOATS, "F32"))
            bias = Made((stored_bias,), lambda given: given[stored_bias], self.found.tensors[stored_bias].dtype, (n,))
        return Linear("int4-g64-asym", n, k, leaves, bias)
