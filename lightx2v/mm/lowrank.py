"""A low-rank branch beside a linear layer of any kind, quantized or not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.elementwise import gelu_tanh
from lightx2v.quant.numerics import Quantized


class LowRankLinear(nn.Module):
    """y = base(x) + (x A^T) B^T with `down` A [R, K] and `up` B [N, R], in the dtype of x.

    Both are zero at first. The state dict is that of `base`.
    """

    down: Tensor
    up: Tensor

    def __init__(
        self,
        base: nn.Module,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, in_features, out_features
        # Tensors of inference mode could not be changed outside of it, and are other inputs to a compiled graph.
        with torch.inference_mode(False):
            down = torch.zeros(rank, in_features, device=device, dtype=dtype)
            up = torch.zeros(out_features, rank, device=device, dtype=dtype)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x [..., K] -> [..., N] in the dtype that `base` gives, after a GELU (tanh) if asked for."""
        y = self._add(self.base(x), x)
        return gelu_tanh(y) if gelu else y

    def multiply(self, codes: Quantized, x: Tensor) -> Tensor:
        """As `QuantLinear.multiply`, for x that has been quantized already."""
        base: Any = self.base
        return self._add(base.multiply(codes, x), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            middle = F.linear(x.to(y.dtype), self.down.to(y.dtype))
            # One kernel, and no second tensor of the size of y; `base` has made y for this call.
            rows = y.reshape(-1, self.out_features)
            return rows.addmm_(middle.reshape(-1, self.rank), self.up.to(y.dtype).t()).view(y.shape)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def without_branch(layer: nn.Module) -> nn.Module:
    """The layer itself of one that has a branch."""
    return layer.base if isinstance(layer, LowRankLinear) else layer
