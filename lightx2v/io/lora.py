"""LoRA files: which of their tensors adds what to which tensor of a model, as their headers tell it.

A low-rank pair adds scale * (up @ down) to a weight, scale = alpha / rank (Hu et al., arXiv 2106.09685); `.diff`,
`.diff_b` and `.diff_m` are added to the weight, the bias and the modulation as they are. A key is the name of a layer
and a suffix; there are many ways to write both, listed here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lightx2v.errors import CheckpointError, suggestion
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint

_SUFFIXES = {
    # PEFT and diffusers, with or without the name of the adapter; LightX2V, ComfyUI, kohya; older diffusers; XLabs
    "down": r"\.lora_A(\.(?!bias$)[^.]+)?(\.weight)?|[._]lora[._]down\.weight|(\.lora_linear_layer)?\.down\.weight",
    "up": r"\.lora_B(\.(?!bias$)[^.]+)?(\.weight)?|[._]lora[._]up\.weight|(\.lora_linear_layer)?\.up\.weight",
    "up_bias": r"\.lora_B(\.[^.]+)?\.bias|\.lora_up\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",
}
_KINDS = {kind: re.compile(f"(?:{suffix})$") for kind, suffix in _SUFFIXES.items()}
_LEAVES = {"up_bias": ("bias",), "diff_b": ("bias",), "diff_m": ("modulation",)}
_LOW_RANK = ("down", "up", "up_bias", "alpha")
_DOTTED = ("base_model.model.", "diffusion_model.", "transformer.", "model.", "unet.")
_PREFIXES = (*_DOTTED, "lora_unet_", "lora_transformer_", "lycoris_")
_ALLOWED = (
    "<layer>.lora_A.weight and .lora_B.weight, .lora_down.weight and .lora_up.weight, _lora.down.weight and"
    " _lora.up.weight, with .alpha; .diff, .diff_b, .diff_m"
)
_FOREIGN = 0.5
"""Of a file with a larger part of unmatched keys than this, the error says that it belongs to another model."""


class Place(NamedTuple):
    """Where a tensor lies that a layout has: its rows from `first` on are rows [start, stop) of the model's `name`."""

    name: str
    start: int = 0
    stop: int | None = None
    first: int = 0


Names = Mapping[str, tuple[Place, ...]]
"""Every way to write the name of a tensor, to the model's tensors that it is in."""


@dataclass(frozen=True, slots=True)
class Delta:
    """`scale * up @ down`, or `scale * up` where there is no `down`, added to rows [start, stop) of `target`."""

    target: str
    start: int
    stop: int
    up: TensorInfo
    down: TensorInfo | None
    first: int
    """Row of `up` that is added to row `start`."""
    scale: float

    @property
    def rank(self) -> int:
        """0 for a full difference."""
        return 0 if self.down is None else self.down.shape[0]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """One LoRA, checked against the model that it is for."""

    checkpoint: Checkpoint
    deltas: tuple[Delta, ...]


def tensor_names(named: Iterable[tuple[str, Place]]) -> Names:
    """Index (name in some layout, place) pairs, also by names with underscores for the layer's dots, as kohya has."""
    found: dict[str, tuple[Place, ...]] = {}
    for name, place in named:
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), place)))  # layouts share names
    for name in list(found):
        layer, _, leaf = name.rpartition(".")
        found.setdefault(f"{layer.replace('.', '_')}.{leaf}", found[name])
    return found


def read_lora(path: Path, names: Names, shapes: Mapping[str, tuple[int, ...]], alpha: float | None = None) -> LoraFile:
    """What a file, or a PEFT directory, adds to the tensors in `shapes`. Reads its header, and the values of alpha.

    `alpha` counts where the file holds none; without either it is the rank. Raises CheckpointError for a LoRA of
    another model, keys that match nothing, halves without the other, and shapes that do not fit.
    """
    checkpoint = Checkpoint.open(path)
    where = str(path)
    groups: dict[tuple[str, str], dict[str, TensorInfo]] = {}
    unmatched = []
    for key, info in checkpoint.tensors.items():
        layer, kind = _split(key)
        if _places(layer, kind, names) is None:
            unmatched.append(key)
            continue
        parts = groups.setdefault((layer, "low rank" if kind in _LOW_RANK else kind), {})
        if kind in parts:
            raise CheckpointError(where, f"'{key}' and '{parts[kind].name}' are the same half of one layer")
        parts[kind] = info
    if unmatched:
        raise _unmatched(where, unmatched, len(checkpoint.tensors), names)
    alphas = [parts["alpha"].name for parts in groups.values() if "alpha" in parts]
    given = {name: float(value) for name, value in checkpoint.stream(alphas)} if alphas else {}
    usual = _declared_alpha(checkpoint) if alpha is None else alpha
    deltas: list[Delta] = []
    for (layer, group), parts in groups.items():
        if group != "low rank":
            deltas += _deltas(where, parts[group], None, _places(layer, group, names) or (), shapes, 1.0)
            continue
        if missing := [kind for kind in ("up", "down") if kind not in parts]:
            raise CheckpointError(where, f"'{next(iter(parts.values())).name}' lacks its '{missing[0]}' half")
        rank = max(1, parts["down"].shape[0]) if parts["down"].shape else 1
        own = given[parts["alpha"].name] if "alpha" in parts else usual
        scale = 1.0 if own is None else own / rank
        deltas += _deltas(where, parts["up"], parts["down"], _places(layer, "up", names) or (), shapes, scale)
        if "up_bias" in parts:
            deltas += _deltas(where, parts["up_bias"], None, _places(layer, "up_bias", names) or (), shapes, scale)
    _refuse_twice(where, deltas)
    return LoraFile(checkpoint, tuple(deltas))


def add_delta(values: Tensor, up: Tensor, down: Tensor | None, scale: float) -> None:
    """Add `scale * up @ down`, or `scale * up`, to the rows `values` of a tensor in place; all in float32."""
    if down is None:
        values.add_(up, alpha=scale)
    else:
        values.flatten(1).addmm_(up.flatten(1), down.flatten(1), alpha=scale)


def _split(key: str) -> tuple[str, str]:
    """A key without its suffix, and what it is; ("", "") for a key of no known style."""
    for kind, suffix in _KINDS.items():
        if match := suffix.search(key):
            return key[: match.start()].replace(".processor.", "."), kind
    return "", ""


def _places(layer: str, kind: str, names: Names) -> tuple[Place, ...] | None:
    """Where that which a key of this kind adds to lies."""
    if not kind:
        return None
    while True:
        for leaf in _LEAVES.get(kind, ("weight", "scale", "")):
            name = f"{layer}.{leaf}" if leaf else layer
            if name in names:
                return names[name]
        prefix = next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), None)
        if prefix is None:
            return None
        layer = layer.removeprefix(prefix)


def _unmatched(where: str, keys: list[str], total: int, names: Names) -> CheckpointError:
    shown = "\n    ".join(keys[:20]) + ("\n    ..." if len(keys) > 20 else "")
    layer, kind = _split(keys[0])
    close = suggestion(f"{layer}.weight", names) if kind else ""
    what, do = f"{len(keys)} of its {total} keys match nothing in the model:\n    {shown}{close}", "give another LoRA"
    if len(keys) > _FOREIGN * total:
        what = f"is no LoRA for this model: {what}"
    else:
        do += ", or take these keys out of the file"
    return CheckpointError(where, what, allowed=_ALLOWED, do=do)


def _deltas(
    where: str,
    up: TensorInfo,
    down: TensorInfo | None,
    places: tuple[Place, ...],
    shapes: Mapping[str, tuple[int, ...]],
    scale: float,
) -> list[Delta]:
    """One for each place, checked against the shape of what it is added to."""
    made = []
    for name, start, end, first in places:
        stop = shapes[name][0] if end is None else end
        made.append(Delta(name, start, stop, up, down, first, scale))
    rows = sum(delta.stop - delta.start for delta in made)
    wanted = (rows, *shapes[places[0].name][1:])
    if down is None:
        _check(where, up.name, up.shape == wanted, up.shape, wanted)
        return made
    fits = min(len(up.shape), len(down.shape), len(wanted)) >= 2
    fits = fits and (up.shape[0], math.prod(down.shape[1:])) == (wanted[0], math.prod(wanted[1:]))
    fits = fits and math.prod(up.shape[1:]) == down.shape[0]
    _check(where, f"{up.name} and {down.name}", fits, f"{up.shape} @ {down.shape}", wanted)
    return made


def _check(where: str, name: str, fits: bool, got: object, wanted: tuple[int, ...]) -> None:
    if not fits:
        raise CheckpointError(where, f"'{name}' has the shape {got}", allowed=f"what adds to a tensor of {wanted}")


def _refuse_twice(where: str, deltas: Iterable[Delta]) -> None:
    """The same layer written in two ways is more likely a mistake than meant."""
    seen: dict[tuple[str, int, bool], Delta] = {}
    for delta in deltas:
        other = seen.setdefault((delta.target, delta.start, delta.down is None), delta)
        if other is not delta:
            what = f"'{other.up.name}' and '{delta.up.name}' are both for '{delta.target}'"
            raise CheckpointError(where, what, do="take one of them out of the file")


def _declared_alpha(checkpoint: Checkpoint) -> float | None:
    """The alpha for all layers that PEFT writes into adapter_config.json and diffusers into the metadata."""
    path = checkpoint.files[0].parent / "adapter_config.json"
    text = checkpoint.metadata.get("lora_adapter_metadata")
    if text is None:
        is_peft = checkpoint.files[0].stem == "adapter_model" and path.is_file()
        text = path.read_text("utf-8") if is_peft else "{}"
    try:
        values = {key.rpartition(".")[2]: value for key, value in json.loads(text).items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            str(checkpoint.path), f"the description of its adapter is no JSON object: {error}"
        ) from error
    if values.get("use_rslora") or values.get("alpha_pattern"):
        raise CheckpointError(str(checkpoint.path), "its use_rslora or alpha_pattern is not supported")
    alpha = values.get("lora_alpha")
    return None if alpha is None else float(alpha)
