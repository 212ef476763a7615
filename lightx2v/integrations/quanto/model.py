"""Quantizing the layers of a model in place, and describing them: optimum-quanto's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.integrations.linear import replace_module
from lightx2v.integrations.quanto.modules import (
    QuantizedConv2d,
    QuantizedLayerNorm,
    QuantizedLinear,
    QuantizedModule,
)
from lightx2v.integrations.quanto.qtypes import QType, activation_type, type_of

Patterns = str | Sequence[str] | None
QuantizationMap = Mapping[str, Mapping[str, str]]
_KINDS: dict[type[nn.Module], type[QuantizedModule]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    nn.LayerNorm: QuantizedLayerNorm,
}


def quantize(
    model: nn.Module,
    weights: str | QType | None = None,
    activations: str | QType | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> None:
    """Exchange the linear layers, 2d convolutions and, for activations, layer norms of `model`, in place.

    `include` and `exclude` are globs on full names; None: every layer, no layer. Weights are rounded anew at each call,
    and train, until `freeze`. Raises ConfigError for unknown types, and where nothing matches.
    """
    kinds = type_of(weights, "weights"), activation_type(activations, "activations")
    wanted, unwanted = _globs(include), _globs(exclude)
    found = 0
    for name, layer in list(model.named_modules()):
        chosen = wanted is None or _matches(name, wanted)
        if chosen and not (unwanted and _matches(name, unwanted)):
            found += _exchange(model, name, layer, *kinds)
    if not found:
        raise ConfigError(
            "quantize",
            f"no layer of {type(model).__name__} was quantized (include {include!r}, exclude {exclude!r})",
            allowed="nn.Linear, nn.Conv2d and, with activations, nn.LayerNorm",
        )


def learn_ranges(model: nn.Module) -> None:
    """Make parameters of the scales and least values of 4 and 2 bits, which else are those of the weights at each call.

    They are `weight_scale` and `weight_low` [N, G] of each layer, start where they were, and are what `freeze` writes.
    Raises ConfigError where there is no such layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedModule) and layer.has_ranges]
    if not layers:
        raise ConfigError("learn_ranges", "no weight of 4 or 2 bits in the model", do="call quantize first")
    for layer in layers:
        layer.learn_ranges()


def freeze(model: nn.Module) -> None:
    """Quantize the weights for good. Raises ConfigError with the layers that were never calibrated."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    missing = [layer.name for layer in layers if layer.lacks_calibration]
    if missing:
        raise ConfigError(
            ", ".join(missing[:5]) + (" and more" if len(missing) > 5 else ""),
            f"the activations of {len(missing)} layers were not calibrated",
            do="run the model within `with Calibration():` first, or exclude these layers",
        )
    for layer in layers:
        layer.freeze()


def quantization_map(model: nn.Module) -> dict[str, dict[str, str]]:
    """`{layer: {"weights": ..., "activations": ...}}` by quanto's names, and "outputs" where results stay as they are.

    optimum-quanto reads the first two, and quantizes the results of whatever has activations.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            found[name] = {"weights": _name(module.weights), "activations": _name(module.activations)}
            if module.outputs != module.activations:
                found[name]["outputs"] = "none"
    return found


def requantize(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    quantization_map: QuantizationMap,
    device: str | torch.device | None = None,
) -> None:
    """Make `model` the one that `state_dict` and `quantization_map` were taken of.

    It may be on the meta device. Afterwards it is on `device`: by default where it was, or on the CPU. Raises
    CheckpointError for layers that are not there, and for tensors that are missing or too many.
    """
    place = torch.device(device or _device(model))
    modules = dict(model.named_modules())
    for name, kinds in quantization_map.items():
        layer = modules.get(name)
        where = f"quantization map, '{name}'"
        if layer is None:
            raise CheckpointError(where, f"is no layer of {type(model).__name__}")
        if not isinstance(layer, QuantizedModule):
            chosen = type_of(kinds["weights"], where), activation_type(kinds.get("activations"), where)
            if not _exchange(model, name, layer, *chosen):
                raise CheckpointError(
                    where, f"is a {type(layer).__name__}", allowed=", ".join(k.__name__ for k in _KINDS)
                )
        made = model.get_submodule(name)
        assert isinstance(made, QuantizedModule)
        made.quantizes_output = type_of(kinds.get("outputs", kinds.get("activations")), where) is not None
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if not on_meta:
        model.to(place)
    tensors = {name: tensor.to(place) for name, tensor in state_dict.items()}
    told: Any = model.load_state_dict(tensors, strict=False, assign=on_meta)
    for kind, names in (("lacks", told.missing_keys), ("has too much:", told.unexpected_keys)):
        if names:
            raise CheckpointError("state_dict", f"{kind} {', '.join(names[:5])}", do="give the whole state dict")


def _exchange(model: nn.Module, name: str, layer: nn.Module, weights: QType | None, activations: QType | None) -> bool:
    """Replace one layer. Returns whether it was."""
    kind = next((made for of, made in _KINDS.items() if type(layer) is of or _plain_subclass(layer, of)), None)
    if kind is None or not name or (weights is None and activations is None):
        return False
    if kind is QuantizedLayerNorm and activations is None:
        return False
    replace_module(model, name, kind(name, layer, weights, activations))
    return True


def _plain_subclass(layer: nn.Module, of: type[nn.Module]) -> bool:
    """Whether `layer` computes as its base class does."""
    return isinstance(layer, of) and type(layer).forward is of.forward


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


def _name(kind: QType | None) -> str:
    return "none" if kind is None else kind.name


def _globs(patterns: Patterns) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
