"""PAB, pyramid attention broadcast (Zhao et al. 2024, arXiv 2408.12588): attention is computed every few steps.

Attention to the text changes least, and is recalled three times as long as attention among the tokens: 2 and 6 steps
in the paper. The feed-forward is always computed.
"""

from __future__ import annotations

from lightx2v.features.base import RunInfo
from lightx2v.features.cache.recall import BranchCache
from lightx2v.features.cache.store import Holding

INTERVAL = 2
CROSS_INTERVALS = 3
WINDOW = (100.0, 800.0)


class Pab(BranchCache):
    """Recalls where the timestep, of 0 to 1000, lies inside `window`."""

    method = "pab"
    kinds = ("self", "cross")

    def __init__(self, holding: Holding, interval: int = INTERVAL, window: tuple[float, float] = WINDOW) -> None:
        super().__init__(holding)
        self.window = window
        self.intervals = {"self": interval, "cross": interval * CROSS_INTERVALS if interval > 1 else 1}

    def recalls(self, run: RunInfo, kind: str, step: int) -> bool:
        low, high = self.window
        return low < 1000 * run.sigmas[step] < high and step % self.intervals[kind] != 0
