"""Layers with quantized weights and activations: in floating point while they train, on codes once they are frozen.

A state dict has optimum-quanto's names: `weight`, or once it is frozen `weight._data`, `weight._scale` and, of 4 and 2
bits, `weight._data._data` and `weight._shift`; `bias`, `input_scale` [], `output_scale` []. Learned ranges, until they
are frozen, are `weight_scale` and `weight_low` [N, G].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.integrations.linear import MovableLinear
from lightx2v.integrations.quanto.calibration import active
from lightx2v.integrations.quanto.fake import fake_activation, fake_weight
from lightx2v.integrations.quanto.frozen import StoredWeight, freeze_linear, quantizes_input
from lightx2v.integrations.quanto.qtypes import QType
from lightx2v.quant.quanto import Ranges, quanto_leaves, ranges_of, read_weight, weight_spec, written_weight
from lightx2v.quant.spec import QSpec

_PARTS = ("_data._data", "_data", "_scale", "_shift")


class QuantizedModule(nn.Module, ABC):
    """What the kinds of layers have in common. `weights` and `activations` are None where they stay as they are."""

    quantizes_input: ClassVar[bool] = False
    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, name: str, layer: Any, weights: QType | None, activations: QType | None) -> None:
        super().__init__()
        self.name, self.weights, self.activations = name, weights, activations
        weight: Tensor | None = layer.weight
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self.shape = () if weight is None else tuple(weight.shape)
        self.dtype = torch.float32 if weight is None else weight.dtype
        ones = torch.ones((), dtype=self.dtype, device=None if weight is None else weight.device)
        self.register_buffer("input_scale", ones)
        self.register_buffer("output_scale", ones.clone())
        self.quantizes_output = activations is not None
        self.spec: QSpec | None = None if weights is None else weight_spec(weights.dtype, self.size[1])
        self.rounds = True
        """Whether a weight that is not frozen is rounded. `solve` has those that it has yet to see computed as is."""
        self._frozen: tuple[Any, ...] = ()
        """The quantized weight, out of reach of state dicts, which have other names for it."""
        self.train(layer.training)

    @property
    def size(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def frozen(self) -> bool:
        """Whether the weight is quantized for good."""
        return bool(self._frozen)

    @property
    def lacks_calibration(self) -> bool:
        """Whether a scale of activations was never found."""
        if self.activations is None or self.frozen:
            return False
        used = (self.quantizes_input, self.input_scale), (self.quantizes_output, self.output_scale)
        return any(needed and float(scale) == 1 for needed, scale in used)

    @property
    def in_use(self) -> Tensor | None:
        """The weight that the layer computes with, in its shape and dtype: rounded, where it is quantized."""
        if self.frozen:
            return self.frozen_weight().view(self.shape)
        weight: Tensor | None = self._parameters["weight"]
        if weight is None or self.spec is None or not self.rounds:
            return weight
        return fake_weight(weight, self.spec, self.ranges)

    @property
    def has_ranges(self) -> bool:
        """Whether the weight has groups with a least value, which ranges can be learned for: 4 and 2 bits."""
        return self.spec is not None and self.spec.is_integer

    @property
    def ranges(self) -> Ranges | None:
        """Learned ranges, where there are any."""
        scale, low = self._parameters.get("weight_scale"), self._parameters.get("weight_low")
        return None if scale is None or low is None else (scale, low)

    def learn_ranges(self, ranges: Ranges | None = None) -> None:
        """Make parameters of the ranges, with these values; by default those that they have now."""
        weight: Tensor | None = self._parameters["weight"]
        if not self.has_ranges or self.frozen or self.spec is None or weight is None:
            return
        with torch.no_grad():
            found = ranges or self.ranges or ranges_of(weight.flatten(1), self.spec)
        for name, values in zip(("weight_scale", "weight_low"), found, strict=True):
            self.register_parameter(name, nn.Parameter(values.detach().float().clone()))

    def freeze(self) -> None:
        """Quantize the weight for good."""
        weight: Tensor | None = self._parameters["weight"]
        if self.spec is None or self.frozen or weight is None:
            return
        self.dtype = weight.dtype
        with torch.no_grad():
            self._hold(quanto_leaves(weight.flatten(1), self.spec, self.ranges))

    def _hold(self, leaves: Mapping[str, Tensor]) -> None:
        self._frozen = (self.hold(leaves),)
        self._drop_weight()
        if (bias := self._parameters["bias"]) is not None:
            bias.requires_grad_(False)

    def _drop_weight(self) -> None:
        self._parameters["weight"] = None
        for name in ("weight_scale", "weight_low"):
            self._parameters.pop(name, None)

    @abstractmethod
    def hold(self, leaves: Mapping[str, Tensor]) -> Any:
        """What keeps a quantized weight."""

    @abstractmethod
    def frozen_weight(self) -> Tensor:
        """Its values [N, K]."""

    @abstractmethod
    def frozen_leaves(self) -> Mapping[str, Tensor]:
        """Its tensors."""

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The layer of an input that is quantized if it has to be."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that this one replaced."""
        if self.activations is None:
            return self.compute(x)
        calibration = active()
        if calibration is not None:
            calibration.see_input(self, x)
        y = self.compute(self.quantized_input(x))
        if calibration is not None:
            calibration.see_output(self, y)
        if not self.quantizes_output:
            return y
        y = fake_activation(y, self.output_scale, self.activations.dtype)
        return y if calibration is None else calibration.mark(self, y)

    def quantized_input(self, x: Tensor) -> Tensor:
        """x on the grid of `input_scale`."""
        if self.activations is None or not self.quantizes_input:
            return x
        return fake_activation(x, self.input_scale, self.activations.dtype)

    def rescaled(self) -> None:
        """Take note of a new `input_scale`."""

    @property
    def outputs(self) -> QType | None:
        """What the result is quantized to."""
        return self.activations if self.quantizes_output else None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("_frozen"):
            return self.in_use  # readers of other libraries want its dtype
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedModule:
        super()._apply(fn, recurse)
        for held in self._frozen:
            held._apply(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen and self.spec is not None:
            written = written_weight(self.frozen_leaves(), self.spec, self.size[1], self.dtype)
            for part, tensor in written.items():
                if part == "_data":
                    tensor = tensor.view(self.shape)
                destination[f"{prefix}weight.{part}"] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = {
            part: state_dict.pop(f"{prefix}weight.{part}") for part in _PARTS if f"{prefix}weight.{part}" in state_dict
        }
        if given:
            self._drop_weight()
        elif self.frozen and f"{prefix}weight" in state_dict:
            self._frozen = ()
            self.register_parameter("weight", nn.Parameter(torch.empty(self.shape, dtype=self.dtype)))
        if f"{prefix}weight_scale" in state_dict:
            self.learn_ranges()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if given:
            self._read(given)

    def _read(self, given: Mapping[str, Tensor]) -> None:
        if self.spec is None:
            raise CheckpointError(self.name, "its weight is quantized in the file and not in the model")
        wanted = {"_data._data", "_scale", "_shift"} if self.spec.is_integer else {"_data", "_scale"}
        if given.keys() != wanted:
            raise CheckpointError(
                self.name, f"the file has weight{{{', '.join(sorted(given))}}}", allowed=", ".join(sorted(wanted))
            )
        place = given["_scale"].device if self.input_scale.is_meta else self.input_scale.device
        self.dtype = given["_scale"].dtype
        try:
            leaves = read_weight({part: tensor.to(place) for part, tensor in given.items()}, self.spec, *self.size)
        except RuntimeError as error:
            shapes = {part: list(tensor.shape) for part, tensor in given.items()}
            raise CheckpointError(self.name, f"tensors of shapes {shapes}", allowed=f"a weight {self.size}") from error
        self._hold(leaves)


class QuantizedLinear(QuantizedModule):
    """y = x W^T + b. Frozen, it runs on this engine's kernels (`mm`)."""

    quantizes_input = True

    def __init__(self, name: str, layer: nn.Linear, weights: QType | None, activations: QType | None) -> None:
        super().__init__(name, layer, weights, activations)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def hold(self, leaves: Mapping[str, Tensor]) -> MovableLinear:
        assert self.spec is not None
        return freeze_linear(
            self.name, leaves, self.spec, self.size, self.dtype, self.bias, self.activations, self.input_scale
        )

    def frozen_weight(self) -> Tensor:
        weight: Tensor = self._frozen[0].weight
        return weight

    def frozen_leaves(self) -> Mapping[str, Tensor]:
        leaves: Mapping[str, Tensor] = self._frozen[0].leaves
        return leaves

    @property
    def _by_kernel(self) -> bool:
        """Whether the kernel quantizes the input."""
        return self.frozen and quantizes_input(self._frozen[0])

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self._by_kernel and not self._differentiable(x) else super().quantized_input(x)

    def compute(self, x: Tensor) -> Tensor:
        if not self.frozen or self._differentiable(x):
            weight = self.in_use
            assert weight is not None
            return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        y: Tensor = self._frozen[0](x)
        return y

    def _differentiable(self, x: Tensor) -> bool:
        """Whether a gradient is wanted, which kernels do not give, or the scale of the input is still changing."""
        return (torch.is_grad_enabled() and x.requires_grad) or (self.activations is not None and active() is not None)

    def rescaled(self) -> None:
        if self._by_kernel:
            self._frozen = (self.hold(self.frozen_leaves()),)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weights}, {self.activations}"


class QuantizedConv2d(QuantizedModule):
    """A convolution; frozen, its codes are dequantized at each call. Its input is never quantized, as in quanto."""

    def __init__(self, name: str, layer: nn.Conv2d, weights: QType | None, activations: QType | None) -> None:
        super().__init__(name, layer, weights, activations)
        geometry: dict[str, Any] = {
            key: getattr(layer, key)
            for key in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        }
        self._shell = (nn.Conv2d(layer.in_channels, layer.out_channels, bias=False, device="meta", **geometry),)

    def hold(self, leaves: Mapping[str, Tensor]) -> StoredWeight:
        assert self.spec is not None
        return StoredWeight(leaves, self.spec, self.size, self.dtype)

    def frozen_weight(self) -> Tensor:
        weight: Tensor = self._frozen[0].values()
        return weight

    def frozen_leaves(self) -> Mapping[str, Tensor]:
        leaves: Mapping[str, Tensor] = self._frozen[0].leaves
        return leaves

    def compute(self, x: Tensor) -> Tensor:
        weight = self.in_use
        assert weight is not None
        return self._shell[0]._conv_forward(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class QuantizedLayerNorm(QuantizedModule):
    """A layer norm whose result alone is quantized."""

    def __init__(self, name: str, layer: nn.LayerNorm, weights: QType | None, activations: QType | None) -> None:
        super().__init__(name, layer, None, activations)
        self.normalized_shape, self.eps = layer.normalized_shape, layer.eps

    def hold(self, leaves: Mapping[str, Tensor]) -> Any:
        raise CheckpointError(self.name, "weights of layer norms are not quantized")

    def frozen_weight(self) -> Tensor:
        raise CheckpointError(self.name, "weights of layer norms are not quantized")

    def frozen_leaves(self) -> Mapping[str, Tensor]:
        return {}

    def compute(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
