"""A quantized linear layer inside a model of another library, which moves it as it likes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.errors import LightX2VError
from lightx2v.mm.linear import QuantLinear, build_linear
from lightx2v.mm.select import LayerPlan
from lightx2v.quant.formats import dequantize_leaves
from lightx2v.quant.layouts import FLOATS

Plan = Callable[[torch.device], LayerPlan]
"""What computes a layer on a device."""


class MovableLinear(nn.Module):
    """A `QuantLinear` that is planned and packed anew on the device that its model is moved to.

    y = x W^T + b for x [..., K] of any floating-point dtype, in that dtype. Codes and scales keep theirs whatever the
    model is cast to. The state dict is the layer's in the layout of `quant.layouts`, the bias in the dtype it had.
    """

    def __init__(self, name: str, bias: bool, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.dtype, self.device = name, dtype, device
        self._plan = plan
        self._bias_dtype = dtype
        self.plan = plan(device)
        self.in_features, self.out_features = self.plan.in_features, self.plan.out_features
        self.inner = _built(self.plan, bias, dtype)

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        """As `QuantLinear.load_tensor`."""
        if leaf == "bias" and tensor.dtype in FLOATS:
            self._bias_dtype = tensor.dtype
        self.inner.load_tensor(leaf, tensor)

    def finish(self) -> None:
        """As `QuantLinear.finish`."""
        self.inner.finish()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        y: Tensor = self.inner(x)
        return y

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] that the codes stand for, made for this call: readers want its dtype and its values."""
        return dequantize_leaves(self.leaves, self.inner.spec, self.dtype)[:, : self.in_features]

    @property
    def leaves(self) -> Mapping[str, Tensor]:
        """Codes and scales as `quant.formats` lists them."""
        inner = self.inner
        if inner.packed is None:
            raise LightX2VError(self.name, "has no weight yet")
        return inner.kernels.unpack(inner.scheme.served, inner.packed)

    @property
    def bias(self) -> Tensor | None:
        """[N] in the dtype that it came in."""
        return None if self.inner.bias is None else self.inner.bias.to(self._bias_dtype)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        destination = self.inner.state_dict(*args, **kwargs)
        key = f"{kwargs.get('prefix', '')}bias"
        if key in destination:
            destination[key] = destination[key].to(self._bias_dtype)
        return destination

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MovableLinear:
        target = fn(torch.empty(0, device=self.device)).device
        if target != self.device and not target.type == "meta" and self.inner.packed is not None:
            self._move(target)
        else:
            super()._apply(fn, recurse)
        self.device = target
        return self

    @torch.no_grad()
    def _move(self, device: torch.device) -> None:
        plan = self._plan(device)
        made = _built(plan, self.inner.bias is not None, self.dtype)
        for leaf, tensor in self.inner.state_dict().items():
            made.load_tensor(leaf, tensor.to(device))
        made.finish()
        self.inner, self.plan = made.train(self.training), plan

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.plan.library}"


def _built(plan: LayerPlan, bias: bool, dtype: torch.dtype) -> QuantLinear:
    made = build_linear(plan, bias, dtype, auto_quant=False)
    assert isinstance(made, QuantLinear)
    return made


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Set the submodule of that full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
