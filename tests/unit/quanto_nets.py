"""Small models with every kind of layer that Quanto quantizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightx2v.integrations import quanto

WEIGHTS = ("qfloat8", "qint8", "qint4", "qint2")


class Net(nn.Module):
    """Linears of 160 (groups of 32), 64 and 33 (whole rows) inputs, a layer norm, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(160, 64)
        self.norm = nn.LayerNorm(64)
        self.down = nn.Linear(64, 33, bias=False)
        self.out = nn.Linear(33, 8)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.down(torch.relu(self.norm(self.up(x)))))
        return y + self.conv(x[:, :144].reshape(-1, 4, 6, 6)).mean((2, 3))


def net(dtype: torch.dtype = torch.float32) -> Net:
    """The same weights each time."""
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def tokens(rows: int = 5, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 160, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def calibrated(model: nn.Module, streamline: bool = True, batches: int = 3) -> nn.Module:
    with quanto.Calibration(streamline=streamline), torch.no_grad():
        for seed in range(batches):
            model(tokens(seed=seed))
    return model
