"""A FLUX.1 checkpoint of any layout as one of the original layout, which the module has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightx2v.errors import CheckpointError
from lightx2v.io.assembled import Piece, assemble, read_as_floats
from lightx2v.io.comfy import LEAF as MARK
from lightx2v.io.declared import declared_layers
from lightx2v.io.weights import Checkpoint
from lightx2v.models.flux.keymap import PREFIX, SWAPPED, is_unused, part_of, to_diffusers
from lightx2v.quant.layouts import INPUT_LEAVES

BLOCKS = ("double_blocks.", "single_blocks.")
_SCALAR = ((), (1,), (1, 1))
_JOINABLE = ("weight", "bias", "weight_scale", "scale_weight", "weight_zero")


def dit_names(names: Iterable[str]) -> list[str]:
    """The names, as they are in the file, of the tensors that belong to a DiT."""
    prefixed = [name for name in names if name.startswith(PREFIX)]
    return [name for name in prefixed or names if not is_unused(name.removeprefix(PREFIX))]


def translate(checkpoint: Checkpoint) -> Checkpoint:
    """The DiT's tensors of a file, under their original names and in the original's pieces.

    Raises CheckpointError where a part of a tensor is missing, and for codes that cannot be put together.
    """
    parts: dict[str, dict[int, str]] = {}
    for name in dit_names(checkpoint.tensors):
        found = part_of(name)
        parts.setdefault(found.original, {})[found.part] = name
    pieces = {original: _pieces(checkpoint, original, found) for original, found in parts.items()}
    declared = {part_of(layer).original for layer in declared_layers(checkpoint.metadata)}
    whole = read_as_floats(checkpoint, pieces, lambda layer: layer.startswith(BLOCKS) or layer in declared)
    return assemble(checkpoint, whole)


def shapes(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """Shapes by original names."""
    return {name: info.shape for name, info in translate(checkpoint).tensors.items()}


def _pieces(checkpoint: Checkpoint, original: str, found: Mapping[int, str]) -> tuple[Piece, ...]:
    name, wanted = found[0] if 0 in found else next(iter(found.values())), part_of(next(iter(found.values()))).parts
    if wanted > 1:
        return _joined(checkpoint, original, [found.get(part) for part in range(wanted)])
    layer, _, leaf = original.rpartition(".")
    if layer != SWAPPED or name.removeprefix(PREFIX) == original:
        return (Piece(name),)
    shape, weight = checkpoint.tensors[name].shape, checkpoint.tensors.get(f"{name.rpartition('.')[0]}.weight")
    if shape in _SCALAR or leaf in INPUT_LEAVES:
        return (Piece(name),)
    if leaf not in _JOINABLE or weight is None or shape[0] != weight.shape[0]:
        raise _cannot(checkpoint, name)
    return Piece(name, shape[0] // 2), Piece(name, 0, shape[0] // 2)


def _joined(checkpoint: Checkpoint, original: str, names: list[str | None]) -> tuple[Piece, ...]:
    """The parts of one layer, of which a file holds the tensors `names` apart."""
    leaf = original.rpartition(".")[2]
    there = [name for name in names if name is not None]
    if leaf == MARK or leaf in INPUT_LEAVES:
        return (Piece(there[0]),)
    missing = [wanted for wanted, name in zip(to_diffusers(original), names, strict=True) if name is None]
    if missing:
        raise CheckpointError(str(checkpoint.path), f"tensor '{missing[0]}' is missing", do="check that it is whole")
    return tuple(_part(checkpoint, name, leaf) for name in there)


def _part(checkpoint: Checkpoint, name: str, leaf: str) -> Piece:
    weight = checkpoint.tensors.get(f"{name.rpartition('.')[0]}.weight")
    shape = checkpoint.tensors[name].shape
    rows = weight.shape[0] if weight is not None else 0
    if leaf not in _JOINABLE:
        raise _cannot(checkpoint, name)
    if leaf in ("weight", "bias") or (shape and shape[0] in (rows, rows / 128)):
        return Piece(name)
    if shape in _SCALAR:
        return Piece(name, repeat=rows)
    raise _cannot(checkpoint, name)


def _cannot(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        str(checkpoint.path),
        f"'{name}' belongs to a quantized layer that cannot be put together from its parts",
        do="convert the unquantized model, or give a file with the original names",
    )
