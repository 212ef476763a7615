"""What the sections of h200.py share: sizes, rows and a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lightx2v.bench.inputs import Size
from lightx2v.bench.measure import Candidate, Timing, measure
from lightx2v.bench.roofline import Peaks
from lightx2v.platform import DeviceInfo


@dataclass(frozen=True)
class Sizes:
    """What is measured: of Wan2.1 at 832x480 and 1280x720, 81 frames; small ones for a dry run."""

    rows: int = 32760
    weights: tuple[tuple[int, int], ...] = ((5120, 5120), (13824, 5120), (5120, 13824))
    tokens: tuple[int, ...] = (32760, 75600)
    heads: int = 8
    head_dim: int = 128
    models: tuple[tuple[str, tuple[Size, ...]], ...] = (
        ("wan-14b-i2v", (Size(832, 480, 81), Size(1280, 720, 81))),
        ("wan-1.3b", (Size(832, 480, 81),)),
    )
    clips: tuple[Size, ...] = (Size(832, 480, 81), Size(1280, 720, 81))
    """What the VAE decodes."""
    vae_channels: int = 96
    encoder_layers: int = 24
    prompts: int = 4
    steps: int = 20
    timing: Timing = field(default_factory=lambda: Timing(repeats=5, warmup=2))
    """Of kernels."""
    long: Timing = field(default_factory=lambda: Timing(repeats=2, warmup=1))
    """Of forward passes and whole models."""
    dry: bool = False


ONCE = Timing(repeats=1)
DRY = Sizes(
    rows=33,
    weights=((32, 48),),
    tokens=(70,),
    heads=1,
    head_dim=64,
    models=(("tiny", (Size(64, 64, 5), Size(64, 96, 5))),),
    clips=(Size(32, 48, 5),),
    vae_channels=8,
    encoder_layers=1,
    prompts=1,
    steps=2,
    timing=ONCE,
    long=ONCE,
    dry=True,
)


@dataclass(frozen=True)
class Row:
    """One figure. `share` is of the measured ceiling that holds for it, `target` what it should reach."""

    section: str
    name: str
    value: float
    unit: str
    share: float | None = None
    target: str = ""


@dataclass(frozen=True)
class Bench:
    """Where and what to measure, and the ceilings of that device."""

    device: DeviceInfo
    sizes: Sizes
    top: Peaks

    def seconds(self, work: Callable[[], Any], timing: Timing | None = None) -> float:
        """Median seconds of a call."""
        candidate = Candidate("it", "lightx2v", lambda: (work, {}))
        return measure([candidate], self.device, timing or self.sizes.timing).entries[0].median

    def share(self, rate: float, name: str) -> float | None:
        """Of the measured peak; None where that product could not be measured."""
        return rate / self.top.flops_per_s[name] if name in self.top.flops_per_s else None


Section = Callable[[Bench], Iterator[Row]]
