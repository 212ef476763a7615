"""How far a quantized layer's results are from those of its float weight, on inputs that were seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.select import plan_layer
from lightx2v.platform import DeviceInfo


def output_error(
    scheme: Scheme, leaves: Mapping[str, Tensor], weight: Tensor, rows: Tensor, device: DeviceInfo
) -> float:
    """|y_q - y| / |y| for inputs [R, K] of a weight [N, K] in float32, and the tensors that were made of it.

    Scales that change with the step are left at their first state, which finds scales for each token.
    """
    x = rows.to(weight.device, torch.float32)
    wanted = x @ weight.T
    size = float(wanted.double().norm())
    layer = made_layer(scheme, leaves, None, weight, torch.float32, device)
    return float((layer(x).double() - wanted.double()).norm()) / size if size else 0.0


def made_layer(
    scheme: Scheme,
    leaves: Mapping[str, Tensor],
    bias: Tensor | None,
    weight: Tensor,
    dtype: torch.dtype,
    device: DeviceInfo,
) -> QuantLinear:
    """A layer in place of one with a float weight [N, K], of the tensors that were made of it."""
    n, k = weight.shape
    plan = plan_layer("layer", scheme.name, scheme, n, k, device=device, fallback=True)
    layer = QuantLinear(k, n, bias is not None, plan.scheme, plan.library, dtype, name="layer")
    for leaf, tensor in leaves.items():
        layer.load_tensor(leaf, tensor.to(weight.device))
    if bias is not None:
        layer.load_tensor("bias", bias.detach())
    layer.finish()
    return layer
