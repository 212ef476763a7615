"""Projections of the same tokens as one product: their weights put together once they are loaded.

Checkpoints and state dicts keep the names of the single layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.mm.linear import QuantLinear
from lightx2v.platform import trim_memory


class FusedPart(nn.Module):
    """One of the layers that `of` computes: its output channels from `start` on."""

    def __init__(self, of: nn.Module, start: int, out_features: int, owner: bool) -> None:
        super().__init__()
        self.start, self.out_features = start, out_features
        if owner:  # registered once, so that moving the model moves it once
            self.whole = of
        self._of = (of,)

    @property
    def of(self) -> nn.Module:
        """The layer of all parts together."""
        return self._of[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] of this part alone."""
        out: Tensor = self.of(x)
        return out[..., self.start : self.start + self.out_features]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        destination, prefix = kwargs.get("destination", {}), kwargs.get("prefix", "")
        total = self.of.out_features
        for leaf, tensor in self.of.state_dict().items():
            # Every tensor of a fused layer has one row for each so many output channels.
            first, count = self.start * tensor.shape[0] // total, self.out_features * tensor.shape[0] // total
            destination[prefix + leaf] = tensor[first : first + count]
        return destination


def exchange_whole(parts: Iterable[FusedPart], of: nn.Module) -> None:
    """Take all parts of a layer from `of` instead, which has the same outputs."""
    for part in parts:
        if "whole" in part._modules:
            part.whole = of
        part._of = (of,)


def fuse_projections(model: nn.Module) -> int:
    """Put together the layers that modules of `model` name in `fused`, where they agree. Returns how many groups."""
    # A list of all modules would hold the single layers, and with them their weights, until the end.
    owners = [(module, groups) for module in model.modules() if (groups := getattr(module, "fused", ()))]
    count = 0
    for module, groups in owners:
        for names in groups:
            if _fuse(module, names):
                count += 1
                trim_memory()  # what a group leaves behind is too small for the next
    return count


def _fuse(module: nn.Module, names: Sequence[str]) -> bool:
    layers = [child for name in names if (child := getattr(module, name, None)) is not None]
    whole = _together(layers) if len(layers) == len(names) else None
    if whole is None:
        return False
    start = 0
    for name, layer in zip(names, layers, strict=True):
        setattr(module, name, FusedPart(whole, start, layer.out_features, owner=not start))
        start += layer.out_features
    return True


def _together(layers: Sequence[Any]) -> nn.Module | None:
    """One layer with the outputs of all, or None where they do not agree."""
    first = layers[0]
    if any(type(layer) is not type(first) or (layer.bias is None) != (first.bias is None) for layer in layers):
        return None
    if type(first) is nn.Linear:
        return _linear(layers)
    if type(first) is QuantLinear and all(first.stacks_with(other) for other in layers[1:]):
        return _quantized(layers)
    return None


def _linear(layers: Sequence[nn.Linear]) -> nn.Linear | None:
    weights = [layer.weight for layer in layers]
    if any(
        (w.dtype, w.shape[1], w.device) != (weights[0].dtype, weights[0].shape[1], weights[0].device) for w in weights
    ):
        return None
    rows = sum(layer.out_features for layer in layers)
    whole = nn.Linear(layers[0].in_features, rows, layers[0].bias is not None, device="meta", dtype=weights[0].dtype)
    tensors = {"weight": torch.cat([w.detach() for w in weights])}
    if layers[0].bias is not None:
        tensors["bias"] = torch.cat([layer.bias.detach() for layer in layers])
    whole.load_state_dict(tensors, assign=True)
    return whole.requires_grad_(False)


def _quantized(layers: Sequence[QuantLinear]) -> QuantLinear:
    first = layers[0]
    rows = sum(layer.out_features for layer in layers)
    whole = QuantLinear(
        first.in_features, rows, first.bias is not None, first.scheme, first.library, first.dtype, name=first.name
    )
    states = [layer.state_dict() for layer in layers]
    for leaf in states[0]:
        whole.load_tensor(leaf, torch.cat([state[leaf] for state in states]))
    whole.finish()
    return whole
