"""What a conversion will write, worked out from the headers of the source alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightx2v import __version__
from lightx2v.convert import naming as names
from lightx2v.convert.checks import check_keys, check_names, check_rule, check_whole
from lightx2v.convert.configs import flux_config, output_config
from lightx2v.convert.lora import Patch, read_loras
from lightx2v.convert.opened import file_names, open_model, unread
from lightx2v.convert.options import DIFFUSERS, Options
from lightx2v.convert.source import fingerprint, locate
from lightx2v.convert.writer import Slot
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.foreign.build import empty_model
from lightx2v.foreign.index import read_model
from lightx2v.foreign.layers import quantizable
from lightx2v.io.declared import declare_layers, declared_layers
from lightx2v.io.dtypes import FLOAT_NAMES, HEADER_NAMES, TORCH_DTYPES
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint
from lightx2v.quant.layouts import SCALE_LEAVES, layouts_of
from lightx2v.quant.spec import QSpec

FORMAT_VERSION = "1"
_BLOCK = re.compile(r"(?:^|\.)(?:blocks?|transformer|(double|single)_blocks)\.(\d+)\.")
_COMFY_NAMES = {"weight_scale": "scale_weight"}
COMFY_MARK = Slot("scaled_fp8", "F8_E4M3", (2,))
"""What tells ComfyUI that the file has fp8 with scales: two zeros."""


@dataclass(frozen=True)
class Item:
    """A tensor of the source, or some of its rows, on the way to `weight`, and to `scales` by leaf if quantized."""

    source: TensorInfo
    """With the shape of the rows that are taken."""
    original: str
    weight: Slot
    scales: Mapping[str, Slot]
    spec: QSpec | None
    patches: tuple[Patch, ...]
    rows: tuple[tuple[int, int], ...]
    """Which rows [start, stop) of the tensor it is made of, one range below the other."""

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The rows of the tensor that become rows [start, stop)."""
        found, first = [], 0
        for begin, end in self.rows:
            low, high = max(start - first, 0), min(stop - first, end - begin)
            if low < high:
                found.append((begin + low, begin + high))
            first += end - begin
        return found

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.weight, *self.scales.values())

    @property
    def layer(self) -> str:
        return self.weight.name.removesuffix(".weight")


@dataclass(frozen=True)
class Shard:
    """One file of the output."""

    file: str
    items: tuple[Item, ...]
    metadata: Mapping[str, str]
    zeros: tuple[Slot, ...] = ()
    """Tensors of zeros that are no tensor of the source."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (*(slot for item in self.items for slot in item.slots), *self.zeros)


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to run."""

    options: Options
    checkpoint: Checkpoint
    config: dict[str, Any] | None
    """The config.json to write."""
    shards: tuple[Shard, ...]
    dropped: tuple[str, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(item for shard in self.shards for item in shard.items)

    @property
    def indexed(self) -> bool:
        return not (self.options.single_file or self.options.pickled)

    @property
    def result(self) -> Path:
        """What to give to a loader: the directory of an index, or the single file."""
        return self.options.output if self.indexed else self.options.output / self.shards[0].file


def scheme_name(spec: QSpec) -> str:
    """The weight half of an mm_type."""
    return f"W-{spec.dtype}-{spec.granularity}{spec.size or ''}" + ("-sym" if spec.symmetric else "")


def make_plan(options: Options) -> Plan:
    """Raises ConfigError or CheckpointError for whatever cannot work."""
    weights, config = locate(options.source, options.model_type)
    if options.model_type == DIFFUSERS:
        assert config is not None
        options = replace(options, layers=frozenset(quantizable(empty_model(read_model(config.parent)))))
    checkpoint = open_model(options.model_type, weights)
    refuse_overwriting(options, checkpoint)
    naming = names.detect(options.model_type, file_names(checkpoint), str(weights))
    layout: names.Layout = "diffusers" if options.direction == "forward" else "original"
    if layout == "diffusers" and options.model_type == "wan_clip":
        raise ConfigError(
            "--direction", "forward is not supported for wan_clip, whose q, k and v are one layer", do="leave it out"
        )
    tensors, dropped = _select(options, checkpoint, naming)
    shapes = {original: info.shape for original, info in tensors.items()}
    if layout == "diffusers" and naming.aliases is not None:
        check_whole(tensors)
    patches, lora_files = read_loras(options.loras, naming, shapes, options.lora_key_convert, layout)
    check_rule(options, tensors, str(weights))
    outputs = {original: naming.outputs(original, shape, layout) for original, shape in shapes.items()}
    check_names([original for original, found in outputs.items() if not found], str(weights))
    items = [
        _item(options, info, original, output, tuple(patches.get(original, ())), ranges)
        for original, info in tensors.items()
        for output, ranges in outputs[original].items()
    ]
    metadata = _metadata(options, checkpoint, lora_files, layout)
    said = _declared(checkpoint, naming)
    shards = tuple(
        Shard(file, tuple(group), metadata | _layers(group, said)) for file, group in _group(options, items).items()
    )
    if options.comfyui_mode:
        shards = (*shards[:-1], replace(shards[-1], zeros=(COMFY_MARK,)))
    described = None
    if options.model_type == "flux_dit":  # the original has no config.json
        described = flux_config(config, naming.source, shapes) if layout == "diffusers" else None
    elif config is not None:
        described = output_config(config, naming.source, layout)
    return Plan(options, checkpoint, described, shards, (*dropped, *unread(checkpoint)))


def refuse_overwriting(options: Options, checkpoint: Checkpoint) -> None:
    """Raises ConfigError for an output where the source is."""
    output = options.output.resolve()
    if output in (options.source.resolve(), *(file.resolve().parent for file in checkpoint.files)):
        raise ConfigError("--output", f"'{options.output}' is where the source is", do="give another directory")


def _select(options: Options, checkpoint: Checkpoint, naming: names.Naming) -> tuple[dict[str, TensorInfo], list[str]]:
    """Tensors to write by original name, in natural order, and the names that are left out."""
    tensors: dict[str, TensorInfo] = {}
    dropped = []
    originals = {name: naming.original(name) for name in checkpoint.tensors}
    check_keys("--ignore-keys", options.ignore_keys, [original for original in originals.values() if original])
    for name, info in checkpoint.tensors.items():
        original = originals[name]
        if original is None or options.rule.drops(original):
            dropped.append(name)
            continue
        if original in tensors:
            raise CheckpointError(str(info.file), f"'{name}' and '{tensors[original].name}' are both '{original}'")
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                str(info.file), f"'{name}' has the dtype {info.dtype}", allowed=", ".join(TORCH_DTYPES)
            )
        tensors[original] = info
    if not tensors:
        raise CheckpointError(str(checkpoint.path), "no tensor is left to write", do="look at --ignore-keys")
    return dict(sorted(tensors.items(), key=lambda pair: _natural(pair[0]))), dropped


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _item(
    options: Options,
    info: TensorInfo,
    original: str,
    output: str,
    patches: tuple[Patch, ...],
    ranges: names.Ranges,
) -> Item:
    height = info.shape[0] if info.shape else 1
    rows = tuple((start, height if stop is None else stop) for start, stop in ranges)
    taken = sum(stop - start for start, stop in rows)
    if taken != height:
        info = replace(info, shape=(taken, *info.shape[1:]), nbytes=info.nbytes // height * taken)
    spec = options.spec if options.rule.quantizes(original, info.shape) else None
    if (spec or patches) and info.dtype not in FLOAT_NAMES:
        raise CheckpointError(
            str(info.file),
            f"'{info.name}' is {info.dtype}: it is quantized already",
            allowed=", ".join(FLOAT_NAMES),
            do="convert the checkpoint that it was made from",
        )
    if spec:
        layer, layout = output.removesuffix(".weight"), layouts_of(spec, info.shape[0], info.shape[1])[0]
        slots = {}
        for leaf, stored in layout.items():
            if stored.required:
                name = _COMFY_NAMES.get(leaf, leaf) if options.comfyui_mode else leaf
                slots[leaf] = Slot(f"{layer}.{name}", HEADER_NAMES[stored.dtype], stored.shape)
        return Item(info, original, slots.pop("weight"), slots, spec, patches, rows)
    is_scale = original.rpartition(".")[2] in SCALE_LEAVES
    dtype = info.dtype if info.dtype not in FLOAT_NAMES or is_scale else options.float_dtype or info.dtype
    return Item(info, original, Slot(output, dtype, info.shape), {}, None, patches, rows)


def _group(options: Options, items: list[Item]) -> dict[str, list[Item]]:
    """The items of each file. A weight and its scale stay together."""
    if options.single_file or options.pickled:
        return {f"{options.output_name}{options.output_ext}": items}
    groups: dict[str, list[Item]] = {}
    if options.save_by_block:
        found = {item.original: match for item in items if (match := _BLOCK.search(item.original))}
        # FLUX's single-stream blocks are numbered on after the double-stream ones.
        doubles = 1 + max((int(match[2]) for match in found.values() if match[1] == "double"), default=-1)
        for item in items:
            match = found.get(item.original)
            number = int(match[2]) + (doubles if match[1] == "single" else 0) if match else None
            file = "non_block.safetensors" if number is None else f"block_{number}.safetensors"
            groups.setdefault(file, []).append(item)
        return groups
    part, count = 1, 0
    for item in items:
        if count and count + len(item.slots) > options.chunk_size:
            part, count = part + 1, 0
        groups.setdefault(f"{options.output_name}_part{part}.safetensors", []).append(item)
        count += len(item.slots)
    return groups


def _metadata(
    options: Options, checkpoint: Checkpoint, loras: Iterable[Checkpoint], layout: names.Layout
) -> dict[str, str]:
    rule = options.rule
    choices = {
        "scheme": scheme_name(options.spec) if options.spec else None,
        "comfyui_mode": options.comfyui_mode,
        "non_linear_dtype": options.float_dtype,
        "key_idx": rule.key_idx,
        "target_keys": rule.target_keys,
        "ignore_keys": rule.ignore_keys,
        "ignore_quant_keys": rule.ignore_quant_keys,
        "loras": [
            {"hash": fingerprint(file), "strength": option.strength, "alpha": option.alpha}
            for option, file in zip(options.loras, loras, strict=True)
        ],
        "lora_key_convert": options.lora_key_convert,
    }
    return {
        "format": "pt",
        "format_version": FORMAT_VERSION,
        "tool": f"lightx2v {__version__}",
        "model_type": options.model_type,
        "layout": layout,
        "source_hash": f"sha256:{fingerprint(checkpoint)}",
        "options": json.dumps(choices, sort_keys=True),
    }


def _declared(checkpoint: Checkpoint, naming: names.Naming) -> dict[str, str]:
    """What the source says of its quantized layers, by the original name of their weights."""
    found = {naming.original(f"{layer}.weight"): said for layer, said in declared_layers(checkpoint.metadata).items()}
    return {name: said for name, said in found.items() if name is not None}


def _layers(group: Iterable[Item], said: Mapping[str, str]) -> dict[str, str]:
    kept = {item.layer: said[item.original] for item in group if not item.spec and item.original in said}
    return declare_layers(kept | {item.layer: scheme_name(item.spec) for item in group if item.spec})
