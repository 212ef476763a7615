"""Weights that are quantized for good: linear layers on this engine's kernels, others stored as codes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lightx2v.integrations.linear import MovableLinear
from lightx2v.integrations.quanto.qtypes import QType
from lightx2v.mm.base import Packed
from lightx2v.mm.reference import held_tensors, hold
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.platform import select_device
from lightx2v.quant.formats import dequantize_leaves, written_leaves
from lightx2v.quant.spec import QSpec


def mm_type_of(spec: QSpec, activations: QType | None, device: torch.device) -> str:
    """The mm_type of a weight; activations are part of it where codes of both are multiplied.

    A CPU has no product of fp8 codes: there the input is rounded to them, and weights alone are quantized.
    """
    if spec.is_integer:
        return f"{spec.dtype}-g{spec.size}-asym" if spec.size else f"{spec.dtype}-channel-asym"
    if activations is None or activations.dtype != spec.dtype or (spec.dtype == "fp8" and device.type == "cpu"):
        return f"{spec.dtype}-weight-only"
    return "int8-static" if spec.dtype == "int8" else "fp8-pertensor"


def quantizes_input(layer: MovableLinear) -> bool:
    """Whether the kernel itself does, by `input_scale`."""
    return layer.plan.scheme.activation is not None


def freeze_linear(
    name: str,
    leaves: Mapping[str, Tensor],
    spec: QSpec,
    size: tuple[int, int],
    dtype: torch.dtype,
    bias: Tensor | None,
    activations: QType | None,
    input_scale: Tensor,
) -> MovableLinear:
    """The layer of a weight of `size` [N, K], on the device where its tensors are."""
    device = leaves["weight"].device
    mm_type = mm_type_of(spec, activations, device)
    made = MovableLinear(name, bias is not None, partial(_plan, name, mm_type, *size), device, dtype)
    for leaf, tensor in written_leaves(leaves, spec).items():
        made.load_tensor(leaf, tensor)
    if bias is not None:
        made.load_tensor("bias", bias.detach())
    if quantizes_input(made):
        made.load_tensor("input_scale", input_scale.detach().float().reshape(1))
    made.finish()
    return made


def _plan(name: str, mm_type: str, n: int, k: int, device: torch.device) -> LayerPlan:
    return plan_layer(name, mm_type, parse(mm_type), n, k, device=select_device(str(device)), fallback=False)


class StoredWeight(Packed):
    """Codes and scales [N, K] that are dequantized at each call, for layers that this engine has no product for."""

    def __init__(self, leaves: Mapping[str, Tensor], spec: QSpec, size: tuple[int, int], dtype: torch.dtype) -> None:
        held = hold(parse(mm_type_of(spec, None, leaves["weight"].device)), leaves)
        super().__init__("codes", *size)
        for buffer, tensor in held.named_buffers():
            self.register_buffer(buffer, tensor, persistent=False)
        self.spec, self.dtype = spec, dtype

    @property
    def leaves(self) -> Mapping[str, Tensor]:
        """Its tensors as `quant.formats` lists them."""
        return held_tensors(self)

    def values(self) -> Tensor:
        """The weight [N, K] in the dtype that it had."""
        return dequantize_leaves(self.leaves, self.spec, self.dtype)[:, : self.k]
