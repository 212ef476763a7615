"""LoRA files of every common style, merged into the weights they belong to.

W += strength * alpha / rank * (up @ down), in float32 (Hu et al., https://arxiv.org/abs/2106.09685). `.diff`,
`.diff_b` and `.diff_m` are added to the weight, the bias and the modulation as they are, times the strength.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightx2v.convert.naming import Layout, Naming
from lightx2v.convert.options import LoraOption
from lightx2v.convert.source import RowReader
from lightx2v.errors import CheckpointError, suggestion
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint

_PAIRS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
_SUFFIXES = {**_PAIRS, ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m"}
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_")
_LEAVES = {"diff_b": ("bias",), "diff_m": ("modulation",)}


@dataclass(frozen=True)
class Patch:
    """What one LoRA adds to one tensor: `scale * up @ down`, or `scale * up` alone when there is no `down`."""

    reader: RowReader
    up: str
    down: str | None
    scale: float

    def add(self, values: Tensor, start: int, stop: int) -> None:
        """Add to rows [start, stop) of the tensor, which `values` holds in float32, in place."""
        up = self.reader.rows(self.up, start, stop).to(values.device, torch.float32)
        if self.down is None:
            values.add_(up, alpha=self.scale)
            return
        down = self.reader.rows(self.down).to(values.device, torch.float32)
        values.flatten(1).addmm_(up.flatten(1), down.flatten(1), alpha=self.scale)


def read_loras(
    options: Iterable[LoraOption], naming: Naming, shapes: Mapping[str, tuple[int, ...]], match: str, layout: Layout
) -> tuple[dict[str, list[Patch]], list[Checkpoint]]:
    """The patches of each tensor (by original name), in the order of the files, and the files.

    `shapes` has the tensors of the source by original name. `match` is "auto" (names of either layout), "same" (of the
    output, which has `layout`) or "convert" (of the source). Raises CheckpointError for keys that match nothing, halves
    without the other, and shapes that do not fit.
    """
    patches: dict[str, list[Patch]] = {}
    files = []
    layouts: dict[str, tuple[Layout, ...]] = {"same": (layout,), "convert": (naming.source,)}
    names = _aliases(shapes, naming, layouts.get(match, ("original", "diffusers")))
    for option in options:
        checkpoint = Checkpoint.open(option.path)
        files.append(checkpoint)
        for name, patch in _read(option, checkpoint, names, shapes):
            patches.setdefault(name, []).append(patch)
    return patches, files


def _aliases(originals: Iterable[str], naming: Naming, layouts: tuple[Layout, ...]) -> dict[str, str]:
    """Every way to write a tensor's name, its module dotted or with underscores, to its original name."""
    found = {}
    for original in originals:
        for layout in layouts:
            name = naming.output(original, layout)
            if name is not None:
                module, _, leaf = name.rpartition(".")
                found[name] = original
                found[f"{module.replace('.', '_')}.{leaf}"] = original
    return found


def _read(
    option: LoraOption, checkpoint: Checkpoint, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterable[tuple[str, Patch]]:
    """(original name, patch) for all that one file holds."""
    where = str(option.path)
    found: dict[tuple[str, str], dict[str, TensorInfo]] = {}
    unmatched = []
    for key, info in checkpoint.tensors.items():
        base, kind = _split(key)
        target = _target(base, kind, names)
        if target is None:
            unmatched.append(key)
        else:
            group = "low rank" if kind in ("down", "up", "alpha") else kind
            found.setdefault((target, group), {})[kind] = info
    if unmatched:
        raise _unmatched(where, unmatched, names)
    declared = _declared_alpha(checkpoint) if option.alpha is None else option.alpha
    reader = RowReader(checkpoint)
    for (target, group), parts in found.items():
        if group != "low rank":
            info = parts[group]
            _check(where, info.name, info.shape == shapes[target], info.shape, shapes[target])
            yield target, Patch(reader, info.name, None, option.strength)
            continue
        up, down = _pair(where, parts, shapes[target])
        alpha = float(checkpoint.load(parts["alpha"].name)) if "alpha" in parts else declared
        rank = down.shape[0]
        scale = 1.0 if alpha is None else alpha / rank
        yield target, Patch(reader, up.name, down.name, option.strength * scale)


def _split(key: str) -> tuple[str, str]:
    """A key without its suffix, and what it is; ("", "") for a key of no known style."""
    for suffix, kind in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace(".processor.", "."), kind
    return "", ""


def _target(base: str, kind: str, names: Mapping[str, str]) -> str | None:
    """The original name of the tensor that a part of a LoRA belongs to."""
    if not kind:
        return None
    while True:
        for leaf in _LEAVES.get(kind, ("weight", "")):
            name = f"{base}.{leaf}" if leaf else base
            if name in names:
                return names[name]
        prefix = next((prefix for prefix in _PREFIXES if base.startswith(prefix)), None)
        if prefix is None:
            return None
        base = base.removeprefix(prefix)


def _unmatched(where: str, keys: list[str], names: Mapping[str, str]) -> CheckpointError:
    shown = "\n    ".join(keys[:20]) + ("\n    ..." if len(keys) > 20 else "")
    base, kind = _split(keys[0])
    close = suggestion(f"{base}.weight", names) if kind else ""
    return CheckpointError(
        where,
        f"{len(keys)} keys match nothing in the source:\n    {shown}{close}",
        allowed=f"<layer>{{{', '.join(_SUFFIXES)}}}",
        do="give a LoRA that was made for this model; --lora_key_convert auto accepts the names of both layouts",
    )


def _pair(where: str, parts: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> tuple[TensorInfo, TensorInfo]:
    """(up, down), which fit each other and the tensor."""
    missing = [kind for kind in ("up", "down") if kind not in parts]
    if missing:
        raise CheckpointError(where, f"'{next(iter(parts.values())).name}' lacks its '{missing[0]}' half")
    up, down = parts["up"], parts["down"]
    fits = min(len(up.shape), len(down.shape), len(shape)) >= 2
    fits = fits and (up.shape[0], math.prod(down.shape[1:])) == (shape[0], math.prod(shape[1:]))
    fits = fits and math.prod(up.shape[1:]) == down.shape[0]
    _check(where, f"{up.name} and {down.name}", fits, f"{up.shape} @ {down.shape}", shape)
    return up, down


def _check(where: str, name: str, fits: bool, got: object, wanted: tuple[int, ...]) -> None:
    if not fits:
        raise CheckpointError(where, f"'{name}' has the shape {got}", allowed=f"what adds to a tensor of {wanted}")


def _declared_alpha(checkpoint: Checkpoint) -> float | None:
    """The alpha for all layers that PEFT writes into adapter_config.json and diffusers into the metadata."""
    path = checkpoint.files[0].parent / "adapter_config.json"
    described: dict[str, Any] = {}
    if "lora_adapter_metadata" in checkpoint.metadata:
        described = json.loads(checkpoint.metadata["lora_adapter_metadata"])
    elif checkpoint.files[0].stem == "adapter_model" and path.is_file():
        described = json.loads(path.read_text("utf-8"))
    values = {key.rpartition(".")[2]: value for key, value in described.items()}
    if values.get("use_rslora") or values.get("alpha_pattern"):
        raise CheckpointError(str(checkpoint.path), "its use_rslora or alpha_pattern is not supported")
    alpha = values.get("lora_alpha")
    return None if alpha is None else float(alpha)
