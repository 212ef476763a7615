"""FORA (Selvaraju et al. 2024, arXiv 2407.01425): attention and feed-forward are computed every few steps."""

from __future__ import annotations

from lightx2v.features.base import RunInfo
from lightx2v.features.cache.recall import BranchCache
from lightx2v.features.cache.store import Holding

INTERVAL = 3


class Fora(BranchCache):
    """Between the steps that are multiples of `interval`, the outputs of all submodules of a block are recalled."""

    method = "fora"
    kinds = ("self", "cross", "mlp")

    def __init__(self, holding: Holding, interval: int = INTERVAL) -> None:
        super().__init__(holding)
        self.interval = interval

    def recalls(self, run: RunInfo, kind: str, step: int) -> bool:
        return step % self.interval != 0
