"""Small models for the tests of AngelSlim's interface, and what its types mean in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightx2v.integrations.angelslim.types import find_type
from lightx2v.integrations.linear import MovableLinear
from tests.numerics.definitions import weight_values

TYPES = ("fp8-per-tensor", "fp8-per-tensor-weight-only", "fp8-per-block", "fp8-per-token", "fp8-per-token-sgl")
N, K = 136, 200


class Block(nn.Module):
    """A feed-forward, whose widths fill no block of 128 or multiple of 16."""

    def __init__(self, dim: int = K, hidden: int = N) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


class Net(nn.Module):
    """Two blocks between layers that no default pattern names."""

    def __init__(self, dim: int = K) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head = nn.Linear(dim, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


BLOCKS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def seeded(module: type[nn.Module] = Net, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module().eval()


def relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach(), wanted.detach()
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def _e4m3(scaled: Tensor) -> Tensor:
    return scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()


def input_values(x: Tensor, quant_type: str) -> Tensor:
    """What a type makes of activations [M, K], in float64."""
    exact = x.double()
    if quant_type.endswith("weight-only"):
        return exact
    if quant_type == "fp8-per-tensor":
        amax = x.abs().amax()
        if x.dtype == torch.bfloat16:  # as AngelSlim: the multiplier and the products are bfloat16
            multiplier = amax.double().reciprocal().bfloat16().double().mul(448).bfloat16().double()
            return _e4m3((exact * multiplier).bfloat16()) / multiplier
        return _e4m3(exact / (amax.double() / 448)) * (amax.double() / 448)
    size = 128 if quant_type == "fp8-per-block" else x.shape[1]
    parts = []
    for part in exact.split(size, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / 448
        parts.append(_e4m3(part / scale.clamp(min=1e-300)) * scale)
    return torch.cat(parts, dim=1)


def defined(layer: MovableLinear, x: Tensor, quant_type: str) -> Tensor:
    """x [..., K] through a layer, in float64 from the tensors of its state dict."""
    state = layer.state_dict()
    leaves = {leaf: state[leaf] for leaf in ("weight", "weight_scale")}
    if leaves["weight_scale"].ndim == 0:
        leaves["weight_scale"] = leaves["weight_scale"].reshape(1, 1)
    values = input_values(x.reshape(-1, x.shape[-1]), quant_type)
    product = values @ weight_values(leaves, find_type(quant_type).spec).T
    if "bias" in state:
        product = product + state["bias"].double()
    return product.reshape(*x.shape[:-1], -1)
