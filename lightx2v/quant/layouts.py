"""The tensors in which checkpoints hold a quantized weight: the names, dtypes and shapes that are read and written.

A weight is [N, K]; the names are the last component of a tensor's name, as in `<layer>.weight_scale`. The first layout
of a spec is LightX2V's, which is the one written; the others are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightx2v.quant.around import AROUND_LEAVES
from lightx2v.quant.packing import swizzled_shape
from lightx2v.quant.spec import CODEBOOKS, QSpec, gguf_kind

Shape = tuple[int, ...]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INPUT_LEAVES = ("input_scale", "scale_input", "input_absmax", "input_global_scale", "input_zero", "input_steps")
"""What tells how a layer's input is quantized: it may come with a float weight too."""
SCALE_LEAVES = (
    *INPUT_LEAVES,
    *("weight_scale", "weight_global_scale", "weight_scale_2", "scale_weight", "alpha", "weight_zero"),
    *("weight_scale_map", "weight_scale_absmax", "weight_scale_offset", *AROUND_LEAVES),
)
"""Every tensor of a quantized layer besides its weight and bias."""

_E4M3, _E8M0, _BYTE, _INT = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.int32
_SCALAR: tuple[Shape, ...] = ((), (1,), (1, 1))


class Stored(NamedTuple):
    """A tensor as a header describes it."""

    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True, slots=True)
class Leaf:
    """What one tensor may look like; the first dtype and shape are those written. No shapes: any."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...] = ()
    required: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    def takes(self, shape: Shape) -> bool:
        return not self.shapes or shape in self.shapes


Layout = Mapping[str, Leaf]


def _leaf(dtype: torch.dtype | tuple[torch.dtype, ...], *shapes: Shape, required: bool = True) -> Leaf:
    return Leaf(dtype if isinstance(dtype, tuple) else (dtype,), shapes, required)


def _optional(*shapes: Shape, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Leaf:
    return Leaf(dtypes, shapes, required=False)


_MARK = _optional(dtypes=(_BYTE,))
"""ComfyUI's `comfy_quant`: bytes of JSON."""


_STATIC: Layout = {
    "input_scale": _optional(),
    "input_zero": _optional(),
    "input_steps": _optional(dtypes=(_INT,)),
}


def packed_width(spec: QSpec, k: int) -> int:
    """Elements of a row of the stored `weight`: bytes of packed codes, of K filled up to whole groups."""
    if spec.dtype == "fp8" or (spec.dtype == "int8" and not spec.is_integer):
        return k
    bits = spec.bits
    assert bits is not None
    return int(spec.filled(k) * bits / 8)


def layouts_of(spec: QSpec, n: int, k: int) -> tuple[Layout, ...]:
    """Every way in which a weight [n, k] of `spec` is stored."""
    around = _around(n, k)
    return tuple({**layout, **around} for layout in _layouts_of(spec, n, k))


def _around(n: int, k: int) -> Layout:
    return {
        "input_multiplier": _optional((k,)),
        "input_rotation": _optional(*_SCALAR, dtypes=(_INT,)),
        "lowrank_down": _optional(),
        "lowrank_up": _optional(),
    }


def _layouts_of(spec: QSpec, n: int, k: int) -> tuple[Layout, ...]:
    if gguf_kind(spec):
        return ({"weight": _leaf(_BYTE), "weight_type": _leaf(_INT, *_SCALAR)},)
    codes = (n, packed_width(spec, k))
    if spec.dtype == "nvfp4":
        return _nvfp4(n, codes, spec.scale_shape(n, k))
    if spec.is_integer:
        return _integers(n, k, codes, spec)
    if spec.dtype in CODEBOOKS:
        return (_codebook(codes, spec.scale_shape(n, k), spec.dtype.endswith("_double")),)
    if spec.dtype.startswith("mxfp"):
        plain = spec.scale_shape(n, k)
        # LightX2V keeps e4m3 as bytes, others as what it is.
        weight = _leaf((_BYTE, _E4M3) if spec.dtype == "mxfp8" else _BYTE, codes)
        scale = _leaf((_E8M0, _BYTE), swizzled_shape(*plain), plain)
        return ({"weight": weight, "weight_scale": scale, "comfy_quant": _MARK},)
    code = {"int8": torch.int8, "fp8": _E4M3}[spec.dtype]
    if spec.granularity != "tensor":
        shapes = [spec.scale_shape(n, k)] + ([(n,)] if spec.granularity == "channel" else [])
        layout: Layout = {"weight": _leaf(code, codes), "weight_scale": _leaf(FLOATS, *shapes)}
        return ({**layout, **(_STATIC if spec.dtype == "int8" else {})},)
    scales: tuple[Shape, ...] = (*_SCALAR, (1, n), (n, 1), (n,))
    return (
        {
            "weight": _leaf(code, codes),
            "weight_scale": _leaf(FLOATS, *scales),
            "input_scale": _optional(*_SCALAR),
            "comfy_quant": _MARK,
        },
        {"weight": _leaf(code, codes), "scale_weight": _leaf(FLOATS, *scales), "scale_input": _optional(*_SCALAR)},
    )


def _nvfp4(n: int, codes: Shape, plain: Shape) -> tuple[Layout, ...]:
    common = {"weight": _leaf(_BYTE, codes), "weight_scale": _leaf(_E4M3, swizzled_shape(*plain), plain)}
    scalar = _leaf(FLOATS, *_SCALAR)
    given = {"input_absmax": _optional(*_SCALAR), "input_global_scale": _optional(*_SCALAR)}
    return (
        {**common, "weight_global_scale": scalar, **given, "alpha": _optional(*_SCALAR)},
        {**common, "input_global_scale": scalar, "alpha": scalar},
        {**common, "weight_scale_2": scalar, "input_scale": _optional(*_SCALAR), "comfy_quant": _MARK},
    )


def _integers(n: int, k: int, codes: Shape, spec: QSpec) -> tuple[Layout, ...]:
    scale = _leaf(FLOATS, spec.scale_shape(n, k))
    dtype = torch.int8 if spec.dtype == "int8" and spec.symmetric else _BYTE
    plain: Layout = {"weight": _leaf(dtype, codes), "weight_scale": scale}
    if not spec.symmetric:
        return ({**plain, "weight_zero": scale},)
    if (spec.dtype, spec.size) != ("int4", 128) or k % 128 or n % 64:
        return (plain,)
    marlin: Layout = {
        "weight": _leaf(_INT, (k // 16, 2 * n)),
        "weight_scale": _leaf(FLOATS, (k // 128, n)),
        "weight_workspace": _optional(dtypes=(_INT,)),
    }
    return (plain, marlin)


def _codebook(codes: Shape, scales: Shape, double: bool) -> Layout:
    if not double:
        return {"weight": _leaf(_BYTE, codes), "weight_scale": _leaf(FLOATS, scales)}
    nested = -(-scales[0] * scales[1] // 256)
    return {
        "weight": _leaf(_BYTE, codes),
        "weight_scale": _leaf(_BYTE, scales),
        "weight_scale_map": _leaf(FLOATS, (256,)),
        "weight_scale_absmax": _leaf(FLOATS, (nested,)),
        "weight_scale_offset": _leaf(FLOATS, *_SCALAR),
    }


def accepted(spec: QSpec, n: int, k: int) -> dict[str, Leaf]:
    """Each tensor that some layout has, with all the forms it takes; required when every layout requires it."""
    layouts = layouts_of(spec, n, k)
    merged: dict[str, Leaf] = {}
    for name in dict.fromkeys(name for layout in layouts for name in layout):
        forms = [layout[name] for layout in layouts if name in layout]
        dtypes = tuple(dict.fromkeys(dtype for form in forms for dtype in form.dtypes))
        shapes = tuple(dict.fromkeys(shape for form in forms for shape in form.shapes))
        required = len(forms) == len(layouts) and all(form.required for form in forms)
        merged[name] = Leaf(dtypes, shapes if all(form.shapes for form in forms) else (), required)
    return merged


def find_layout(spec: QSpec, n: int, k: int, given: Mapping[str, Stored]) -> Layout | None:
    """The layout that the tensors of a layer are in; None when they are in none."""
    for layout in layouts_of(spec, n, k):
        whole = all(name in given for name, leaf in layout.items() if leaf.required)
        if whole and all(
            name in layout and stored.dtype in layout[name].dtypes and layout[name].takes(stored.shape)
            for name, stored in given.items()
        ):
            return layout
    return None


def misfit(
    spec: QSpec,
    n: int,
    k: int,
    given: Mapping[str, Stored],
    prefix: str = "",
    dtype_name: Callable[[torch.dtype], str] | None = None,
) -> str:
    """Why no layout fits: the first tensor that is missing, too much, or of a wrong dtype or shape.

    `prefix` goes before its name, and dtypes are named by `dtype_name` (by torch's names).
    """
    known, named = accepted(spec, n, k), dtype_name or short
    for name, stored in given.items():
        if name not in known:
            return f"tensor '{prefix}{name}' is not part of it"
        leaf = known[name]
        if stored.dtype not in leaf.dtypes:
            return f"'{prefix}{name}' is {named(stored.dtype)}, wanted is {' or '.join(map(named, leaf.dtypes))}"
        if not leaf.takes(stored.shape):
            wanted = " or ".join(str(list(shape)) for shape in leaf.shapes)
            return f"'{prefix}{name}' has shape {list(stored.shape)}, wanted is {wanted}"
    if missing := [prefix + name for name, leaf in known.items() if leaf.required and name not in given]:
        return f"missing: {', '.join(missing)}"
    ways = " or ".join(
        ", ".join(name for name, leaf in layout.items() if leaf.required) for layout in layouts_of(spec, n, k)
    )
    return f"its tensors are {', '.join(given)}; wanted are {ways}"


def short(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
