"""What a file of this engine says of its quantized layers: `quantization`, a JSON text in the safetensors metadata.

    {"layers": {"blocks.0.ffn.0": "W-int4-group64-sym"}}

The value is the scheme of an mm_type without its library: the weight alone, or weight and activation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

KEY = "quantization"


def declared_layers(metadata: Mapping[str, str]) -> dict[str, str]:
    """Scheme by layer; empty where nothing is said, or nothing that is understood."""
    try:
        layers = json.loads(metadata[KEY])["layers"]
        return {str(layer): str(scheme) for layer, scheme in layers.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def declare_layers(layers: Mapping[str, str]) -> dict[str, str]:
    """The metadata that says so; none for no layers."""
    return {KEY: json.dumps({"layers": dict(layers)}, sort_keys=True)} if layers else {}


def merge_metadata(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """The metadata of two files as one: the first counts, and layers are put together."""
    both = {**second, **first}
    if KEY in first and KEY in second:
        both |= declare_layers(declared_layers(second) | declared_layers(first))
    return both
