"""From the tensors of a checkpoint to the ones that libraries compute with, from floats to them, and back.

A weight is [N, K], G groups of K; the names are the last component of a tensor's name, as in `<layer>.weight_scale`.
`read_leaves` takes any of the layouts of `quant.layouts` and gives what a library's `prepare` takes:

    int8, fp8   weight [N, K] codes; weight_scale float32 [N, 1], [blocks, blocks] or [1]; perhaps input_scale [1]
    mxfp*       weight e4m3 [N, K] or uint8 (packed); weight_scale float8_e8m0fnu [N, G]
    nvfp4       weight uint8 [N, K/2]; weight_scale e4m3 [N, G]; weight_global_scale float32 [];
                perhaps input_global_scale float32 []
    integers    weight uint8 [N, bytes] of codes from 0 (int8 symmetric: int8 [N, K]); weight_scale float32 [N, G];
                affine ones: weight_zero float32 [N, G]
    nf4, fp4    weight uint8 [N, K/2]; weight_scale float32 [N, G]; `_double` ones: weight_scale uint8 [N, G],
                weight_scale_map [256], weight_scale_absmax [ceil(NG/256)] and weight_scale_offset [], float32
    gguf        weight uint8 [N, bytes of a row]; weight_type int32 []

int8 channels may have input_scale float32 [T], input_zero float32 [T] and input_steps int32 [T + 1], for static
activations; and every weight what `quant.around` lists.

Packed codes have the first of two in the low half of the byte, and K filled up to whole groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.quant import blocks, codebook, gguf, integers
from lightx2v.quant.activations import BLOCK_SCALED
from lightx2v.quant.layouts import FLOATS, Shape
from lightx2v.quant.numerics import dequantize_weight, quantize_weight
from lightx2v.quant.packing import pack4, swap_halves, swizzle, swizzled_shape, unpack_marlin, unswizzle
from lightx2v.quant.spec import CODEBOOKS, GGUF_KINDS, GgufKind, QSpec, gguf_kind

_ALL = 1 << 40
_SMALLEST = torch.finfo(torch.float32).tiny
_COMFY_FORMATS = {"fp8": "float8_e4m3fn", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
_COMFY_KEYS = {"format", "full_precision_matrix_mult"}


def needs_amax(spec: QSpec) -> bool:
    """Whether a part of the rows can be quantized only with the largest absolute value of the whole weight."""
    return spec.granularity == "tensor" or spec.dtype == "nvfp4"


def quantize_leaves(weight: Tensor, spec: QSpec, amax: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors that libraries compute with, of a float weight [N, K].

    `amax` is the largest absolute value of the whole when `weight` is a part of its rows. Raises CheckpointError for a
    kind of gguf that floats do not become here, and for a K that its blocks do not divide.
    """
    if spec.dtype == "nvfp4":
        scale = blocks.global_scale(weight.abs().amax() if amax is None else amax)
        made = blocks.nvfp4_blocks(weight, spec, scale, packed=True)
        return {"weight": made.elements, "weight_scale": made.scale, "weight_global_scale": scale}
    if spec.dtype in BLOCK_SCALED:
        made = blocks.mx_blocks(weight, spec, packed=True)
        return {"weight": made.elements, "weight_scale": made.scale}
    if spec.is_integer:
        return integers.integer_leaves(weight, spec)
    if spec.dtype in CODEBOOKS:
        return codebook.codebook_leaves(weight, spec)
    if (kind := gguf_kind(spec)) is not None:
        return _quantize_gguf(weight, kind, spec)
    codes, scale = quantize_weight(weight, spec, amax)
    return {"weight": codes, "weight_scale": scale}


def unmakeable(spec: QSpec, k: int) -> str | None:
    """Why a float weight of k columns does not become `spec` here; None when it does."""
    kind = gguf_kind(spec)
    if kind is None:
        return None
    if kind not in gguf.QUANTIZABLE:
        return f"blocks of {kind} are made by llama.cpp's tools; here floats become {', '.join(gguf.QUANTIZABLE)}"
    odd = k % GGUF_KINDS[kind].values
    return f"blocks of {GGUF_KINDS[kind].values} values do not divide K, which is {k}" if odd else None


def _quantize_gguf(weight: Tensor, kind: str, spec: QSpec) -> dict[str, Tensor]:
    if problem := unmakeable(spec, weight.shape[1]):
        raise CheckpointError(f"gguf-{kind}", problem, do="give a .gguf file")
    number = torch.tensor(GGUF_KINDS[kind].number, dtype=torch.int32, device=weight.device)
    return {"weight": gguf.quantize_blocks(weight, kind), "weight_type": number}


def dequantize_leaves(leaves: Mapping[str, Tensor], spec: QSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] that the tensors of `quantize_leaves` stand for, K filled up to whole groups where packed."""
    weight = leaves["weight"]
    if gguf_kind(spec):
        return gguf.dequantize_blocks(weight, stored_kind(leaves["weight_type"]), dtype)
    if spec.is_integer:
        return integers.integer_values(leaves, spec, dtype)
    if spec.dtype in CODEBOOKS:
        return codebook.codebook_values(leaves, spec, dtype)
    scale = leaves["weight_scale"]
    if spec.dtype not in BLOCK_SCALED:
        return dequantize_weight(weight, scale, spec, dtype)
    values = blocks.scale_blocks(blocks.unpack_elements(weight, spec), scale, spec.size)
    if spec.dtype == "nvfp4":
        values /= leaves["weight_global_scale"]
    return values.to(dtype)


def stored_kind(number: Tensor) -> str:
    """The kind of gguf's blocks that a `weight_type` names. Raises CheckpointError for one that is not read here."""
    kind = gguf.KIND_OF_NUMBER.get(int(number))
    if kind is None:
        raise CheckpointError("weight_type", f"blocks of kind {int(number)}", allowed=", ".join(GGUF_KINDS))
    return kind


def read_leaves(given: Mapping[str, Tensor], spec: QSpec, n: int, k: int, where: str) -> dict[str, Tensor]:
    """The tensors that libraries compute with, from those of a layer in one of `layouts_of(spec, n, k)`.

    Raises CheckpointError, which names `where`, for scales that are inf or NaN and a ComfyUI mark of another format.
    """
    leaves = dict(given)
    if (mark := leaves.pop("comfy_quant", None)) is not None:
        _check_mark(mark, spec, where)
    if gguf_kind(spec):
        return leaves
    if spec.dtype == "int4" and leaves["weight"].dtype == torch.int32:
        codes, scale = unpack_marlin(leaves["weight"], leaves["weight_scale"])
        leaves = {"weight": pack4(codes), "weight_scale": scale}
    elif spec.dtype in BLOCK_SCALED:
        _read_blocks(leaves, spec, spec.scale_shape(n, k), marked=mark is not None)
    elif spec.granularity == "channel":
        leaves["weight_scale"] = leaves["weight_scale"].reshape(n, 1)
        leaves |= {leaf: leaves[leaf].reshape(-1) for leaf in ("input_scale", "input_zero") if leaf in leaves}
    elif spec.granularity == "tensor":
        _read_whole(leaves, n)
    for name, tensor in leaves.items():
        if name != "weight":
            if not bool(torch.isfinite(tensor.float()).all()):
                raise CheckpointError(where, f"'{name}' holds inf or NaN", do="convert the checkpoint again")
            if tensor.dtype in FLOATS:
                leaves[name] = tensor.float()
    return leaves


def _read_whole(leaves: dict[str, Tensor], n: int) -> None:
    """fp8 under one scale, or one for each channel, in LightX2V's or ComfyUI's names."""
    for theirs, ours in (("scale_weight", "weight_scale"), ("scale_input", "input_scale")):
        if theirs in leaves:
            leaves[ours] = leaves.pop(theirs)
    scale = leaves["weight_scale"]
    leaves["weight_scale"] = scale.reshape(1) if scale.numel() == 1 else scale.reshape(n, 1)
    if "input_scale" in leaves:
        leaves["input_scale"] = leaves["input_scale"].reshape(1)


def _read_blocks(leaves: dict[str, Tensor], spec: QSpec, plain: Shape, marked: bool) -> None:
    """Scales of blocks, in the order of tensor cores or in their own, and nvfp4's scales of tensors."""
    weight, scale = leaves["weight"], leaves["weight_scale"]
    if tuple(scale.shape) == swizzled_shape(*plain) and (tuple(scale.shape) != plain or _is_swizzled(leaves, marked)):
        scale = unswizzle(scale, *plain)
    if "weight_scale_2" in leaves:
        # ComfyUI has the first code in the high half of a byte. ModelOpt has it low, and leaves its scales as they are.
        if marked or tuple(leaves["weight_scale"].shape) == swizzled_shape(*plain):
            leaves["weight"] = swap_halves(weight)
        # The factor of a tensor of zeros is 0 there.
        leaves["weight_global_scale"] = leaves.pop("weight_scale_2").float().clamp(min=_SMALLEST).reciprocal()
        if "input_scale" in leaves:
            leaves["input_global_scale"] = leaves.pop("input_scale").float().clamp(min=_SMALLEST).reciprocal()
    if spec.dtype != "nvfp4":
        leaves["weight_scale"] = scale.view(blocks.E8M0)
        leaves["weight"] = weight.view(blocks.E4M3) if spec.dtype == "mxfp8" else weight
        return
    leaves["weight_scale"] = scale
    absmax, alpha = leaves.pop("input_absmax", None), leaves.pop("alpha", None)
    if absmax is not None:
        leaves["input_global_scale"] = blocks.global_scale(absmax)
    if "weight_global_scale" not in leaves:
        assert alpha is not None  # alpha = 1 / (input_global_scale * weight_global_scale)
        leaves["weight_global_scale"] = (alpha.float() * leaves["input_global_scale"].float()).reciprocal()
    for name in ("weight_global_scale", "input_global_scale"):
        if name in leaves:
            leaves[name] = leaves[name].reshape(())


def _is_swizzled(leaves: Mapping[str, Tensor], marked: bool) -> bool:
    """For scales whose shape does not tell: only bytes as scales of e4m3 codes, unmarked, are in their own order."""
    plain = leaves["weight"].dtype == blocks.E4M3 and leaves["weight_scale"].dtype == torch.uint8
    return marked or not plain


def _check_mark(mark: Tensor, spec: QSpec, where: str) -> None:
    """ComfyUI's `comfy_quant`: JSON that names the format, and perhaps a rotation that is not undone here."""
    try:
        said = json.loads(bytes(mark.flatten().tolist()))
        known = said["format"] == _COMFY_FORMATS.get(spec.dtype) and said.keys() <= _COMFY_KEYS
    except (ValueError, TypeError, KeyError, AttributeError):
        said, known = "no JSON", False
    if not known:
        wanted = json.dumps({"format": _COMFY_FORMATS.get(spec.dtype)})
        raise CheckpointError(where, f"'comfy_quant' says {json.dumps(said)}", allowed=wanted, do="use another mm_type")


def logical_shape(spec: QSpec, given: Mapping[str, Tensor]) -> tuple[int, int]:
    """(N, K) of a weight from its tensors, quantized or not; K filled up to whole groups where codes are packed."""
    weight = given["weight"]
    n, width = weight.shape
    if weight.dtype in FLOATS:
        return n, width
    if gguf_kind(spec):
        layout = GGUF_KINDS[stored_kind(given["weight_type"])] if "weight_type" in given else GgufKind(0, 1, 1)
        return n, width // layout.nbytes * layout.values
    if weight.dtype == torch.int32:  # Marlin's
        return width // 2, 16 * n
    return n, width * 8 * weight.element_size() // int(spec.bits or 8)


def written_leaves(leaves: Mapping[str, Tensor], spec: QSpec) -> dict[str, Tensor]:
    """The tensors of `quantize_leaves` as LightX2V stores them: the layout that is written."""
    written = dict(leaves)
    if spec.dtype in BLOCK_SCALED:
        written["weight"] = leaves["weight"].view(torch.uint8)
        written["weight_scale"] = swizzle(leaves["weight_scale"])
    elif spec.granularity == "tensor" and leaves["weight_scale"].numel() == 1:
        written["weight_scale"] = leaves["weight_scale"].reshape(())
    return written


def rows_of(leaf: str, spec: QSpec, start: int, stop: int) -> tuple[int, int] | None:
    """The rows of a written tensor for rows [start, stop) of the weight; None for a tensor of the whole weight."""
    if leaf in ("weight", "weight_zero"):
        return start, stop
    if leaf != "weight_scale" or spec.granularity == "tensor":
        return None
    if spec.dtype in BLOCK_SCALED:
        return start, stop + -stop % 128
    return (start // spec.size, -(-stop // spec.size)) if spec.granularity == "block" else (start, stop)


def rows_together(spec: QSpec) -> int:
    """How many rows of a weight share tensors, so that a conversion must not part them."""
    if spec.dtype in BLOCK_SCALED:
        return 128
    if spec.dtype in CODEBOOKS and codebook.is_double(spec):
        return _ALL
    return spec.size if spec.granularity == "block" else 1


def scale_bytes(spec: QSpec, n: int, k: int) -> int:
    """Bytes of the scales beside the codes of a weight [n, k], in the form that libraries compute with."""
    if gguf_kind(spec):
        return 0
    count, of_tensor = math.prod(spec.scale_shape(n, k)), 4 if spec.dtype == "nvfp4" else 0
    if spec.dtype in CODEBOOKS and codebook.is_double(spec):
        return count + 4 * (-(-count // codebook.NESTED_BLOCK) + 256 + 1)
    affine = spec.is_integer and not spec.symmetric
    return count * (1 if spec.dtype in BLOCK_SCALED else 4) * (2 if affine else 1) + of_tensor
