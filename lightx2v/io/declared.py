"""What a file of this engine says of its quantized layers: `quantization`, a JSON text in the safetensors metadata.

    {"layers": {"blocks.0.ffn.0": "W-int4-group64-sym"}}

The value is the scheme of an mm_type without its library: the weight alone, or weight and activation. "folded" beside
"layers" lists the layers that a calibration changed together, by a multiplier that went out of the one into the other
(`models.fold`): what is known of a model's layers one by one, as a LoRA is, does not hold for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

KEY = "quantization"


def declared_layers(metadata: Mapping[str, str]) -> dict[str, str]:
    """Scheme by layer; empty where nothing is said, or nothing that is understood."""
    layers = _said(metadata, "layers")
    return {str(layer): str(scheme) for layer, scheme in layers.items()} if isinstance(layers, dict) else {}


def folded_layers(metadata: Mapping[str, str]) -> frozenset[str]:
    """The layers that multipliers went out of or into."""
    layers = _said(metadata, "folded")
    return frozenset(map(str, layers)) if isinstance(layers, list) else frozenset()


def declare_layers(layers: Mapping[str, str], folded: Iterable[str] = ()) -> dict[str, str]:
    """The metadata that says so; none for no layers."""
    said: dict[str, Any] = {"layers": dict(layers)} if layers else {}
    if names := sorted(set(folded)):
        said["folded"] = names
    return {KEY: json.dumps(said, sort_keys=True)} if said else {}


def _said(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[KEY])[key]
    except (KeyError, ValueError, TypeError):
        return None


def merge_metadata(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """The metadata of two files as one: the first counts, and layers are put together."""
    both = {**second, **first}
    if KEY in first and KEY in second:
        folded = folded_layers(first) | folded_layers(second)
        both |= declare_layers(declared_layers(second) | declared_layers(first), folded)
    return both
