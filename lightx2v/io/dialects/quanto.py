"""Files of optimum-quanto, and of diffusers' QuantoConfig (https://github.com/huggingface/optimum-quanto, 0.2.7).

    <layer>.weight._data              int8 or e4m3 [N, K], and
    <layer>.weight._scale             [N, 1]: value = data * scale
    <layer>.weight._data._data        uint8: codes of 4 or 2 bits of the weight as [NG, K / G], packed along the first
                                      dimension: bits from i * b on of row r are row r + i * rows of the codes
    <layer>.weight._scale, ._shift    [NG, 1]: value = code * scale - shift; (code - shift) * scale of integer shifts
    <layer>.input_scale, .output_scale   [] of quantized activations, value = code * scale; 1 where they are not

Groups are of 128 of a row, or of 96, 64, 32 when that does not divide K; rows of 128 and less, and ones that none
divides, are whole. `quantization_map.json` or `quanto_qmap.json` beside the file
names the types of each layer. Quanto rounds the results of a layer with quantized activations, too, which no layer of
this engine does; `lightx2v.integrations.quanto` says in the map where they are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.derived import Given, Made
from lightx2v.io.dialects.base import Found, Translation
from lightx2v.quant.integers import pack_integers
from lightx2v.quant.quanto import GROUPS, group_size, unpack_rows
from lightx2v.quant.spec import QSpec

MAPS = ("quanto_qmap.json", "quantization_map.json")
"""What optimum-quanto's QuantizedDiffusersModel writes and reads, and the name in its guide."""
_BYTES, _BITS = ".weight._data", ".weight._data._data"
_EIGHT = {"I8": "int8-weight-only", "F8_E4M3": "fp8-weight-only"}
_TYPES = ("qint8", "qint4", "qint2", "qfloat8", "qfloat8_e4m3fn")
_STATIC = {"I8": ("qint8",), "F8_E4M3": ("qfloat8", "qfloat8_e4m3fn")}
"""Activations that are multiplied with weights of the same type."""
_STATIC_TYPES = {"I8": "int8-static", "F8_E4M3": "fp8-pertensor"}


class Quanto:
    """The dialect."""

    def detect(self, found: Found) -> bool:
        return any(name.endswith((_BYTES, _BITS)) for name in found.tensors)

    def translate(self, found: Found) -> Translation:
        """Codes of 8 bits as they are, shorter ones packed along K instead."""
        activations = _activations(found)
        translation = Translation(found)
        for layer in found.ending(_BYTES):
            _eight_bits(translation, layer, activations.get(layer))
        for layer in found.ending(_BITS):
            if layer in activations:
                raise _mixed(found, layer, activations[layer])
            _few_bits(translation, layer)
        # What is left are scales of layers whose weights are floats, as norms are: of results that stay as they are.
        translation.take(*(name for name in found.tensors if name.endswith((".input_scale", ".output_scale"))))
        return translation


DIALECT = Quanto()


def _activations(found: Found) -> dict[str, str]:
    """The type of the quantized inputs of each layer that has them, by the map."""
    name, types = next(((name, types) for name in MAPS if (types := found.beside(name))), ("", {}))
    quantized = {}
    for layer, said in types.items():
        kinds = said if isinstance(said, dict) else {}
        weights, activations = kinds.get("weights"), kinds.get("activations", "none")
        if weights not in (*_TYPES, "none", None):
            raise found.refuse(f"{name} says that '{layer}' has weights of type {weights!r}", ", ".join(_TYPES))
        if activations in ("none", None):
            continue
        if kinds.get("outputs", activations) != "none":
            raise found.refuse(
                f"{name} says that '{layer}' has activations of type {activations!r}, and rounds its results too",
                "activations 'none', or outputs 'none'",
                "load it with lightx2v.integrations.quanto, which rounds results as well, or quantize weights alone",
            )
        quantized[layer] = str(activations)
    return quantized


def _mixed(found: Found, layer: str, activations: str) -> CheckpointError:
    return found.refuse(
        f"'{layer}' has activations of type {activations!r} and weights of another one",
        "qint8 with qint8, qfloat8 with qfloat8",
        "load it with lightx2v.integrations.quanto",
    )


def _eight_bits(translation: Translation, layer: str, activations: str | None) -> None:
    found, data, scale = translation.found, layer + _BYTES, f"{layer}.weight._scale"
    info = found.tensors[data]
    if info.dtype not in _EIGHT or len(info.shape) != 2:
        raise found.refuse(f"'{data}' is {info.dtype} {list(info.shape)}", "int8 and float8_e4m3fn of linear layers")
    _check_scale(found, scale, info.shape[0])
    leaves = {"weight": translation.same(data), "weight_scale": translation.same(scale)}
    mm_type = _EIGHT[info.dtype]
    if activations is not None:
        if activations not in _STATIC[info.dtype]:
            raise _mixed(found, layer, activations)
        of_input = f"{layer}.input_scale"
        if of_input not in found.tensors or found.tensors[of_input].shape not in ((), (1,)):
            raise found.refuse(f"'{of_input}' is missing or no single number", "the scale of the input, []")
        leaves["input_scale"] = Made((of_input,), lambda given: given[of_input].float().reshape(1), "F32", (1,))
        mm_type = _STATIC_TYPES[info.dtype]
    _add(translation, layer, mm_type, leaves, info.shape[0], info.shape[1])


def _few_bits(translation: Translation, layer: str) -> None:
    found, data = translation.found, layer + _BITS
    scale, shift = f"{layer}.weight._scale", f"{layer}.weight._shift"
    rows, width = found.tensors[data].shape
    groups = found.tensors[scale].shape[0] if scale in found.tensors else 0
    _check_scale(found, scale, groups)
    _check_scale(found, shift, groups)
    bits = next((bits for bits in (4, 2) if rows == -(-groups * bits // 8)), 0)
    if found.tensors[data].dtype != "U8" or not bits:
        raise found.refuse(f"'{data}' has {rows} rows for {groups} scales", "codes of 4 or 2 bits")
    n = _outputs(found, layer, groups, width)
    k = width * groups // n
    spec = QSpec(f"int{bits}", "group" if groups > n else "channel", width if groups > n else 0, symmetric=False)
    name = f"int{bits}-g{width}-asym" if groups > n else f"int{bits}-channel-asym"

    def codes(given: Given) -> Tensor:
        flat = unpack_rows(given[data], bits, groups).reshape(n, k)
        return pack_integers(torch.nn.functional.pad(flat, (0, spec.filled(k) - k)), spec)

    def zero(given: Given) -> Tensor:
        moved = given[shift].float()
        return (moved / given[scale].float() if given[shift].is_floating_point() else moved).reshape(n, -1)

    leaves = {
        "weight": Made((data,), codes, "U8", (n, spec.filled(k) * bits // 8)),
        "weight_scale": Made((scale,), lambda given: given[scale].float().reshape(n, -1), "F32", (n, groups // n)),
        "weight_zero": Made((shift, scale), zero, "F32", (n, groups // n)),
    }
    _add(translation, layer, name, leaves, n, k)


def _add(translation: Translation, layer: str, mm_type: str, leaves: dict[str, Made], n: int, k: int) -> None:
    translation.layer(layer, mm_type, leaves, n, k)


def _outputs(found: Found, layer: str, groups: int, width: int) -> int:
    """N of a layer whose codes are [groups, width], by its bias or the model, or where width is that of no group."""
    if (bias := found.tensors.get(f"{layer}.bias")) is not None:
        n = bias.shape[0]
    elif layer in found.wanted.sizes:
        n = found.wanted.sizes[layer][0]
    elif width not in GROUPS:
        n = groups
    else:
        raise found.refuse(
            f"'{layer}' has no bias, and rows of {width} codes may be of groups or whole",
            do="run it with model_cls diffusers, which knows the sizes of layers",
        )
    if groups % n or (groups > n and group_size(width * groups // n) != width):
        raise found.refuse(f"'{layer}' has {groups} groups of {width} for {n} outputs, not as Quanto makes them")
    return n


def _check_scale(found: Found, name: str, rows: int) -> None:
    info = found.tensors.get(name)
    if info is None or info.shape != (rows, 1):
        raise found.refuse(
            f"'{name}' {'is missing' if info is None else f'has shape {list(info.shape)}'}", f"[{rows}, 1]"
        )
