"""AngelSlim's five kinds of quantization as mm_types of this engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightx2v.errors import ConfigError, suggestion
from lightx2v.mm.libraries import unavailable
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.platform import DeviceInfo, select_device
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.numerics import ANGELSLIM, quantize_whole_bfloat16
from lightx2v.quant.spec import QSpec

Rounding = Literal["angelslim", "float32"]
"""Whose arithmetic the scales under which whole tensors are quantized have: AngelSlim's in bfloat16, or float32."""

_WHOLE = "W-fp8-tensor-sym-A-fp8-tensor-sym-dynamic"
_ROWS = "W-fp8-channel-sym-A-fp8-channel-sym-dynamic"


@dataclass(frozen=True, slots=True)
class QuantType:
    """mm_types of one kind, each the first of a list that can be computed."""

    name: str
    products: tuple[str, ...]
    """With fp8 products of the hardware."""
    elsewhere: tuple[str, ...]
    """On devices that have none."""
    without: tuple[str, ...]
    """On devices that have them, when the caller wants none."""

    @property
    def scheme(self) -> Scheme:
        """The scheme of them all, in any library."""
        return parse(self.elsewhere[0]).with_library("auto")

    @property
    def spec(self) -> QSpec:
        """What its weights are."""
        spec = self.scheme.weight
        assert spec is not None
        return spec


def _whole(rounding: Rounding) -> tuple[QuantType, QuantType]:
    act, library = ("-ActAngelSlim", "AngelSlim") if rounding == "angelslim" else ("", "Dequantize")
    plain = (f"{_WHOLE}-{library}",)
    weight_only = (f"W-fp8-tensor-sym-{library}",)
    return (
        QuantType("fp8-per-tensor", (f"{_WHOLE}-TorchScaled{act}", *plain), plain, plain),
        QuantType("fp8-per-tensor-weight-only", weight_only, weight_only, weight_only),
    )


_TYPES: dict[Rounding, dict[str, QuantType]] = {
    rounding: {
        kind.name: kind
        for kind in (
            *_whole(rounding),
            QuantType("fp8-per-block", ("fp8-b128",), ("fp8-b128",), ("fp8-b128-reference",)),
            QuantType("fp8-per-token", ("fp8",), ("fp8",), ("fp8-reference",)),
            QuantType(
                "fp8-per-token-sgl",
                ("fp8-sgl", f"{_ROWS}-Auto-ActSgl", f"{_ROWS}-Reference-ActSgl"),
                (f"{_ROWS}-Auto-ActSgl",),
                (f"{_ROWS}-Reference-ActSgl",),
            ),
        )
    }
    for rounding in ("angelslim", "float32")
}
NAMES = tuple(_TYPES["angelslim"])


def find_type(name: str, rounding: Rounding = "angelslim") -> QuantType:
    """The kind called `name`. Raises ConfigError, with the closest name."""
    if rounding not in _TYPES:
        raise ConfigError("rounding", f"unknown rounding '{rounding}'", allowed=", ".join(_TYPES))
    kind = _TYPES[rounding].get(name)
    if kind is None:
        near = suggestion(str(name), NAMES)
        raise ConfigError("quant_type", f"unknown quant_type '{name}'{near}", allowed=", ".join(NAMES))
    return kind


def has_fp8(device: DeviceInfo) -> bool:
    """Whether the device multiplies fp8 codes: compute capability 8.9, as AngelSlim has it."""
    return device.capability is not None and device.capability >= (8, 9)


@dataclass(frozen=True, slots=True)
class Planner:
    """Which library computes a layer; `native` is the caller's word on fp8 products, None takes what the device has."""

    kind: QuantType
    native: bool | None

    def plan(self, name: str, n: int, k: int, place: torch.device) -> LayerPlan:
        """The plan of the layer `name` with a weight [n, k] on the device `place`. Raises ConfigError if none can."""
        device = select_device(str(place))
        against = []
        *first, last = self._mm_types(device)
        for mm_type in first:
            scheme = parse(mm_type)
            problem = None if scheme.library == "auto" else unavailable(scheme.library, scheme, n, k, device)
            if problem is None:
                last = mm_type
                break
            against.append(f"; {mm_type}: {problem}")
        plan = plan_layer(name, last, parse(last), n, k, device=device, fallback=False)
        return replace(plan, reason=plan.reason + "".join(against))

    def _mm_types(self, device: DeviceInfo) -> tuple[str, ...]:
        fp8 = has_fp8(device)
        if self.native or (self.native is None and fp8):
            return self.kind.products
        return self.kind.without if fp8 else self.kind.elsewhere


@torch.no_grad()
def quantize(weight: Tensor, kind: QuantType, rounding: Rounding) -> dict[str, Tensor]:
    """Codes [N, K] and scale of a float weight.

    AngelSlim's rounding is of bfloat16 weights, so that whole tensors of other dtypes become that first.
    """
    if kind.spec.granularity == "tensor" and rounding == "angelslim":
        codes, scale = quantize_whole_bfloat16(weight.to(torch.bfloat16), ANGELSLIM)
        return {"weight": codes, "weight_scale": scale}
    return quantize_leaves(weight, kind.spec)
