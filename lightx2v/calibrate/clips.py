"""Whole runs of a quantized checkpoint beside those of the float weights that it was made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightx2v.config.schema import Config, MMConfig
from lightx2v.eval.metrics import psnr
from lightx2v.plan import Plan
from lightx2v.plan.resolve import resolve
from lightx2v.runner import Runner

_SEEDS = 1000
"""Seeds of the clips begin so far behind those of the calibration."""
_MOST = 100.0
"""dB of clips that are the same, and the most that any count for."""


@dataclass(frozen=True)
class Measured:
    """The PSNR of several clips, in dB."""

    mean: float
    error: float = 0.0
    """Standard error of the mean; 0 for a single clip, which does not tell."""

    def less(self, margin: float) -> float:
        """The mean less so many of its standard errors, which that of other clips is likely to reach."""
        return self.mean - margin * self.error

    @staticmethod
    def of(distances: Sequence[float]) -> Measured:
        """The figures of single clips taken together."""
        spread = statistics.stdev(distances) if len(distances) > 1 else 0.0
        return Measured(statistics.fmean(distances), spread / math.sqrt(len(distances)))


class Clips:
    """One clip for each of `prompts`, of the request of a `plan` with float weights."""

    def __init__(self, plan: Plan, prompts: Sequence[str]) -> None:
        self.plan, self.prompts = plan, prompts
        self._reference: list[NDArray[np.uint8]] = []

    def measure(self, checkpoint: Path) -> Measured:
        """The PSNR of the clips of a quantized checkpoint against those of the float weights."""
        if not self._reference:
            self._reference = self._run(self.plan.config)
        # LoRAs are in the weights already that the checkpoint was made of.
        changes = {"mm_config": MMConfig(mm_type="auto", fallback=True), "dit_quantized_ckpt": checkpoint, "lora": ()}
        clips = self._run(self.plan.config.model_copy(update=changes))
        return Measured.of([min(psnr(*pair), _MOST) for pair in zip(clips, self._reference, strict=True)])

    def _run(self, config: Config) -> list[NDArray[np.uint8]]:
        plan = resolve(config, self.plan.device)
        runner, request = Runner(plan), plan.request
        return [
            runner.run(replace(request, prompt=prompt, seed=request.seed + _SEEDS + number), quiet=True)
            for number, prompt in enumerate(self.prompts)
        ]
