"""LightX2V's Custom: TeaCache's decisions, and what is reused is extrapolated by a Taylor series of first order."""

from __future__ import annotations

from collections.abc import Sequence

from lightx2v.features.cache.store import Holding
from lightx2v.features.cache.teacache import THRESHOLD, TeaCache


class Custom(TeaCache):
    method = "custom"

    def __init__(
        self,
        holding: Holding,
        coefficients: Sequence[float],
        threshold: float = THRESHOLD,
        use_ret_steps: bool = False,
        time_signal: bool = False,
    ) -> None:
        super().__init__(holding, coefficients, threshold, use_ret_steps, time_signal, order=1)
