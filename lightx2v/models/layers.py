"""Small layers that models of several families share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.deferred import Tokens
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.together import feed_forward


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids of `timestep` [B], cosines first: [B, dim] float32. The angles are float64 as in the original."""
    exact = torch.float32 if timestep.device.type == "mps" else torch.float64
    half = dim // 2
    rates = torch.arange(half, dtype=exact, device=timestep.device).mul_(-math.log(10000) / half).exp_()
    angles = timestep.to(exact)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that `module` computes in: its parameters', or the one that its quantized layers were made for."""
    held = next(module.parameters(), None)
    if held is not None:
        return held.dtype
    return next(layer.dtype for layer in module.modules() if isinstance(layer, QuantLinear))


class Float32Linear(nn.Linear):
    """Computed in float32 whatever its weights are held in: for the time embedding, which is made once per request."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


def rope_angles(positions: Tensor, width: int, theta: float = 10000.0) -> Tensor:
    """Angles [..., width / 2] float64 by which positions turn `width` components (Su et al. 2021, arXiv 2104.09864)."""
    rates = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return positions.double()[..., None] * rates


class FeedForward(nn.Sequential):
    """Two linears with a GELU (tanh) between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x: Tokens) -> Tensor:
        return feed_forward(x, self[0], self[2])
