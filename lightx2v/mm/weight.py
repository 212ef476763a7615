"""LightX2V's own interface to one matrix multiplication: `MM_WEIGHT_REGISTER[mm_type](weight_name, bias_name)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.mm.custom import MMWeightLike
from lightx2v.mm.linear import build_linear
from lightx2v.mm.scheme import declare, parse
from lightx2v.mm.select import plan_layer
from lightx2v.platform import select_device
from lightx2v.quant.formats import logical_shape
from lightx2v.quant.layouts import accepted
from lightx2v.registry import Registry

MakeWeight = Callable[..., MMWeightLike]


class MMWeight:
    """One linear layer by names: `set_config`, then `load` from a dict of tensors, then `apply`."""

    def __init__(self, mm_type: str, weight_name: str, bias_name: str | None = None) -> None:
        self.mm_type, self.weight_name, self.bias_name = mm_type, weight_name, bias_name
        self.mm_config: Mapping[str, Any] = {}
        self.module: nn.Module | None = None

    def set_config(self, mm_config: Mapping[str, Any]) -> None:
        """Take `weight_auto_quant` and `fallback`; the rest of the mm_config does not concern one layer."""
        self.mm_config = mm_config

    def load(self, weight_dict: Mapping[str, Tensor]) -> None:
        """Take the weight, its scales (`<name>.weight_scale` and so on) and the bias, on the device where they are.

        Raises CheckpointError for what is missing or does not fit, ConfigError when no library can compute it here.
        """
        name = self.weight_name.removesuffix(".weight")
        tensors = {"weight": self._get(weight_dict, self.weight_name)}
        if self.bias_name is not None:
            tensors["bias"] = self._get(weight_dict, self.bias_name)
        scheme, weight = parse(self.mm_type), tensors["weight"]
        n, k = weight.shape
        if scheme.weight is not None:
            leaves = {leaf: f"{name}.{leaf}" for leaf in accepted(scheme.weight, n, k) if leaf != "weight"}
            tensors |= {leaf: weight_dict[full] for leaf, full in leaves.items() if full in weight_dict}
            n, k = logical_shape(scheme.weight, tensors)
        plan = plan_layer(
            name,
            self.mm_type,
            scheme,
            n,
            k,
            device=select_device(str(weight.device)),
            fallback=bool(self.mm_config.get("fallback", False)),
        )
        if self.mm_type == "Default":
            module = nn.Linear(weight.shape[1], weight.shape[0], "bias" in tensors, device="meta", dtype=weight.dtype)
            module.load_state_dict(tensors, assign=True)
            self.module = module.requires_grad_(False)
            return
        auto_quant = bool(self.mm_config.get("weight_auto_quant", False))
        made: Any = build_linear(plan, "bias" in tensors, weight.dtype, auto_quant)
        for leaf, tensor in tensors.items():
            made.load_tensor(leaf, tensor)
        made.finish()
        self.module = made

    def _get(self, weight_dict: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in weight_dict:
            raise CheckpointError(self.weight_name, f"tensor '{name}' is missing")
        return weight_dict[name]

    def apply(self, x: Tensor) -> Tensor:
        """x [M, K] or [..., K] -> [..., N] in the dtype of x."""
        if self.module is None:
            raise RuntimeError(f"{self.weight_name}: load() was not called")
        with torch.no_grad():
            out: Tensor = self.module(x)
        return out


class _MMRegistry(Registry[MakeWeight]):
    """Every mm_type that parses, and the ones added from outside."""

    def add(self, name: str, value: MakeWeight | str, aliases: Iterable[str] = ()) -> None:
        for new in (name, *aliases):
            declare(new)
        super().add(name, value, aliases)

    def canonical(self, name: str) -> str:
        return super().canonical(name) if name in self._values or name in self._aliases else parse(name).name

    def __getitem__(self, name: str) -> MakeWeight:
        if name in self._values or name in self._aliases:
            return super().__getitem__(name)
        return partial(MMWeight, self.canonical(name))

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self.canonical(name) is not None
        except ConfigError:
            return False


MM_WEIGHT_REGISTER: Registry[MakeWeight] = _MMRegistry("mm_type")
