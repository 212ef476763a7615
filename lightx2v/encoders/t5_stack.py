"""What the encoders of T5 and UMT5 have in common, as transformers builds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GatedFeedForward(nn.Module):
    """The gated feed-forward layer of transformers with the same submodules, for any kind of linear.

    The layer of transformers casts to the dtype of `wo.weight`, which a swapped linear does not have.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = layer.wi_0, layer.wi_1, layer.wo, layer.act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.wi_0(x)) * self.wi_1(x)
        # A float `wo` may be held in a wider dtype than the rest; a swapped one casts by itself.
        return self.wo(x.to(self.wo.weight.dtype) if type(self.wo) is nn.Linear else x)


def meta_stack(model: Callable[[Any], Any], config: Any) -> nn.Module:
    """The encoder stack of transformers' `model`, on meta, for any kind of linear."""
    with torch.device("meta"):
        stack = model(config).encoder.eval()
    for block in stack.block:
        block.layer[1].DenseReluDense = GatedFeedForward(block.layer[1].DenseReluDense)
    return stack


def weight_dtypes(dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What each tensor of a stack that computes in `dtype` is held in."""
    # float16 is too narrow for what `wo` adds up to, as transformers has found.
    return lambda name: torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype
