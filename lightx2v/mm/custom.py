"""mm_types from outside the package: `@MM_WEIGHT_REGISTER("my-type")` on a class with LightX2V's methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from lightx2v.errors import CheckpointError


class MMWeightLike(Protocol):
    """What LightX2V asks of a matrix multiplication; the constructor takes (weight_name, bias_name or None)."""

    def set_config(self, mm_config: Mapping[str, Any]) -> None:
        """Take `mm_type`, `weight_auto_quant` and whatever else the JSON's mm_config holds."""
        ...

    def load(self, weight_dict: Mapping[str, Tensor]) -> None:
        """Take its tensors, by full name."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """x [M, K] times the weight, plus the bias: [M, N]."""
        ...


class CustomLinear(nn.Module):
    """A linear layer computed by an object of a registered class: a place in a model for what is no nn.Module."""

    def __init__(self, name: str, weight: MMWeightLike, mm_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.mm_config = name, mm_config
        self.custom = weight
        self._loaded: dict[str, Tensor] = {}

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        """Keep one tensor of the checkpoint for `finish`."""
        self._loaded[f"{self.name}.{leaf}"] = tensor

    def finish(self) -> None:
        """Hand all tensors over, once."""
        if f"{self.name}.weight" not in self._loaded:
            raise CheckpointError(self.name, "tensor 'weight' is missing")
        self.custom.set_config(self.mm_config)
        self.custom.load(self._loaded)
        self._loaded = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        out = self.custom.apply(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], out.shape[-1]).to(x.dtype)

    def extra_repr(self) -> str:
        return type(self.custom).__name__
