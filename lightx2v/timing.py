"""Seconds and peak memory of each stage of a run, and the table that shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lightx2v import platform
from lightx2v.platform import DeviceInfo
from lightx2v.units import human_bytes


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage: wall-clock seconds and the device's peak memory in bytes by its end."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(slots=True)
class StageTimer:
    """Collects stages in order; on a device that works asynchronously it waits for the stage's work to end."""

    device: DeviceInfo
    stages: list[StageTime] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        platform.reset_peak_memory(self.device)
        began = time.perf_counter()
        try:
            yield
        finally:
            platform.synchronize(self.device)
            self.stages.append(StageTime(name, time.perf_counter() - began, platform.peak_memory(self.device)))

    def table(self) -> str:
        """A line per stage, and the total."""
        total = sum(stage.seconds for stage in self.stages)
        peak = max((stage.peak_bytes for stage in self.stages), default=0)
        memory = "peak RSS" if self.device.kind == "cpu" else "peak memory"
        rows = [f"{'stage':<22}{'seconds':>9}{memory:>14}"]
        rows += [f"{s.name:<22}{s.seconds:>9.2f}{human_bytes(s.peak_bytes):>14}" for s in self.stages]
        return "\n".join([*rows, f"{'total':<22}{total:>9.2f}{human_bytes(peak):>14}"])
