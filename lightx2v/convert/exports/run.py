"""Writes a quantized checkpoint as another package's files, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lightx2v.convert.configs import copy_other_files, output_config, write_json
from lightx2v.convert.exports.base import Export, Exported, Layer, Written
from lightx2v.convert.exports.registry import EXPORTS
from lightx2v.convert.naming import Layout, detect
from lightx2v.convert.options import Options
from lightx2v.convert.planning import refuse_overwriting
from lightx2v.convert.run import Report
from lightx2v.convert.source import locate
from lightx2v.convert.writer import Slot, open_output
from lightx2v.errors import CheckpointError
from lightx2v.io.assembled import SCALED
from lightx2v.io.comfy import LEAF as MARK
from lightx2v.io.declared import declared_layers
from lightx2v.io.derived import Made, derive
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from lightx2v.io.dtypes import FLOAT_NAMES
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import known_scheme, parse
from lightx2v.plan.layers import stored_type
from lightx2v.platform import peak_memory, select_device
from lightx2v.quant.layouts import SCALE_LEAVES

_ATTENTION = "attn_scales"
_UNUSED = (MARK, "alpha", "weight_workspace")
"""Leaves that say nothing the others do not."""
_WIDTHS = ((1, 1), (2, 1), (4, 1), (4, 3), (8, 3))
"""Codes for so many bytes of a row, in the order in which they are tried."""


@dataclass(frozen=True)
class _Names:
    """Names of the files to write, by those of the source; None for what they have no use for."""

    of: Callable[[str], str | None]
    source: Layout
    output: Layout

    def layer(self, name: str) -> str:
        """The same for a layer."""
        return (self.of(f"{name}.weight") or "").removesuffix(".weight")


def export(options: Options) -> Report:
    """Write the files that `options.to` names.

    Every layer is looked at before anything is written. Raises CheckpointError for one that the package cannot hold,
    ConfigError, and ResourceError.
    """
    assert options.to is not None
    begin, target = time.perf_counter(), EXPORTS[options.to]
    weights, config = locate(options.source, options.model_type)
    checkpoint = open_any(weights, Wanted(lambda layer: True))
    refuse_overwriting(options, checkpoint)
    names = _names(options, checkpoint)
    exported = _layers(target, checkpoint, names)
    recipes: dict[str, Made | str] = {}
    for name in _others(checkpoint, set(exported)):
        if (written := names.of(name)) is not None:
            recipes[written] = name
    for found in exported.values():
        recipes |= found.tensors
    kinds = {names.layer(name): found.kind for name, found in exported.items()}
    made = derive(checkpoint, {**recipes, **target.beside(kinds)}, {})
    owners = {tensor: names.layer(name) for name, found in exported.items() for tensor in found.tensors}
    path = options.output / target.file(options.output_name, _is_dit(options), kinds)
    slots = [Slot(name, info.dtype, info.shape) for name, info in made.tensors.items()]
    with open_output(path, slots, {"format": "pt"}) as file:
        for name, tensor in made.stream():
            file.write(name, tensor)
    target.describe(Written(path, made, kinds, owners))
    if config is not None:
        write_json(options.output / "config.json", output_config(config, names.source, names.output))
    if options.copy_no_weight_files:
        copy_other_files(checkpoint.files[0].parent, options.output)
    return Report(
        output=str(options.output),
        seconds=round(time.perf_counter() - begin, 3),
        peak_memory_bytes=peak_memory(select_device("cpu")),
        bytes_in=sum(info.nbytes for info in checkpoint.tensors.values()),
        bytes_out=sum(slot.nbytes for slot in slots),
        files=sum(entry.is_file() and entry.suffix == ".safetensors" for entry in options.output.iterdir()),
        files_kept=0,
        layers_quantized=0,
        tensors_kept=len(slots),
        tensors_dropped=0,
        loras=0,
    )


def _is_dit(options: Options) -> bool:
    return not options.model_type.endswith(("_t5", "_clip"))


def _names(options: Options, checkpoint: Checkpoint) -> _Names:
    if options.direction is None:
        return _Names(lambda name: name, "original", "original")
    naming = detect(options.model_type, checkpoint.tensors, str(checkpoint.path))
    layout: Layout = "diffusers" if options.direction == "forward" else "original"

    def renamed(name: str) -> str | None:
        original = naming.original(name)
        found = None if original is None else next(iter(naming.outputs(original, (), layout)), None)
        if original is not None and found is None:
            raise CheckpointError(str(checkpoint.path), f"'{name}' has no name of {layout}", do="leave --direction out")
        return found

    return _Names(renamed, naming.source, layout)


def _layers(target: Export, checkpoint: Checkpoint, names: _Names) -> dict[str, Exported]:
    """What the quantized layers of a checkpoint become, by their names there."""
    of_layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner.rpartition(".")[2].endswith(_ATTENTION):
            raise _refuse(checkpoint, f"'{name}' is a scale of quantized attention", target.held)
        of_layers.setdefault(owner, {})[leaf] = info
    declared = declared_layers(checkpoint.metadata)
    exported = {}
    for name, stored in of_layers.items():
        weight = stored.get("weight")
        if weight is None or (weight.dtype in FLOAT_NAMES or len(weight.shape) != 2):
            if alone := [leaf for leaf in stored if leaf in SCALE_LEAVES]:
                raise _refuse(checkpoint, f"'{name}.{alone[0]}' belongs to no quantized weight", target.held)
            continue
        layer = _layer(target, checkpoint, name, names.layer(name), stored, declared.get(name))
        exported[name] = target.layer(layer)
        recipes = exported[name].tensors.values()
        used = {need for recipe in recipes for need in (recipe.needs if isinstance(recipe, Made) else (recipe,))}
        if lost := [leaf for leaf, info in stored.items() if info.name not in used and leaf not in _UNUSED]:
            raise layer.refuse(f"with '{lost[0]}'")
    if not exported:
        what = "no layer is quantized"
        raise _refuse(checkpoint, what, target.held, "quantize it first: --quantized --linear_type, without --to")
    return exported


def _refuse(checkpoint: Checkpoint, what: str, held: str, do: str = "convert the float model") -> CheckpointError:
    return CheckpointError(str(checkpoint.path), what, allowed=held, do=do)


def _layer(
    target: Export, checkpoint: Checkpoint, name: str, written: str, stored: Mapping[str, TensorInfo], said: str | None
) -> Layer:
    weight = stored["weight"]
    n, width = weight.shape
    found = {}
    for codes, per in _WIDTHS if weight.dtype == "U8" else _WIDTHS[:1]:
        k = width * codes // per
        spec = parse(kind := stored_type(stored, n, k, said)).weight
        if spec is not None and (spec.bits is None or spec.bits * codes == 8 * per):
            found[parse(kind).name] = (kind, k)
    if said is not None:  # what is declared counts, where it fits
        found = {name: kind for name, kind in found.items() if _says(said, kind[0])} or found
    if len(found) != 1:
        what = f"may be {' or '.join(kind for kind, _ in found.values())}" if found else "is in no known layout"
        raise _refuse(checkpoint, f"layer '{name}', {weight.dtype} {list(weight.shape)}, {what}", target.held)
    ((mm_type, k),) = found.values()
    where, scheme = str(checkpoint.path), parse(mm_type)
    return Layer(written, mm_type, scheme, n, k, dict(stored), where, target.held, checkpoint.load)


def _says(said: str, mm_type: str) -> bool:
    """Whether `said`, an mm_type or its first half, has the weights of `mm_type`."""
    scheme = known_scheme(said) or known_scheme(f"{said}-Auto")
    return scheme is not None and scheme.weight == parse(mm_type).weight


def _others(checkpoint: Checkpoint, layers: set[str]) -> Iterator[str]:
    """Tensors of no quantized layer."""
    for name in checkpoint.tensors:
        if name.rpartition(".")[0] not in layers and name != SCALED:
            yield name
