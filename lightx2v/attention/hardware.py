"""What devices backends need, for `Backend.needs`: None where a device will do, else the one that it takes instead."""

from __future__ import annotations

from collections.abc import Callable

from lightx2v.platform import DeviceInfo


def nvidia(*spans: tuple[tuple[int, int], tuple[int, int]], amd: bool = False) -> Callable[[DeviceInfo], str | None]:
    """An NVIDIA GPU of a compute capability within one of `spans`, or an AMD GPU with `amd`."""

    def needs(device: DeviceInfo) -> str | None:
        have = device.capability
        if (amd and device.kind == "rocm") or (have and any(low <= have <= high for low, high in spans)):
            return None
        words = " or ".join(_span(low, high) for low, high in spans)
        return f"an NVIDIA GPU of compute capability {words}{', or an AMD GPU' if amd else ''}"

    return needs


NEWEST = (99, 9)
"""For the end of a span: every capability from its start on."""


def _span(low: tuple[int, int], high: tuple[int, int]) -> str:
    start, end = ".".join(map(str, low)), ".".join(map(str, high))
    return f"{start} or higher" if high == NEWEST else start if low == high else f"{start} to {end}"
