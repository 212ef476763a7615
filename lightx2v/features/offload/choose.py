"""What each form of offload takes in memory, known from sizes alone, and the mildest one with which a plan fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from lightx2v.config.features import OffloadConfig
from lightx2v.errors import ConfigError, UserError
from lightx2v.features.offload.load import GIB, PART, children, spread
from lightx2v.platform import DeviceInfo
from lightx2v.units import human_bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a DiT's weights on the device, without the parts that are read once."""

    blocks: tuple[int, ...]
    part: int
    """Of the largest part of a block that moves by itself."""
    small: int
    """Of the smaller parts of all blocks, which do not."""
    rest: int
    """Outside the blocks."""

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest


def measure(dit: nn.Module, weights: Mapping[str, int], total: int) -> Sizes:
    """The sizes of `dit`, which may be on meta, from the bytes of its tensors or layers by name, `total` in all."""

    def within(name: str) -> int:
        return sum(size for each, size in weights.items() if f"{each}.".startswith(f"{name}."))

    blocks = list(cast(Any, dit).blocks)
    names = {module: name for name, module in dit.named_modules() if module in blocks}
    sizes = [within(names[block]) for block in blocks]
    parts, small = [0], 0
    for block, size in zip(blocks, sizes, strict=True):
        large = [part for name, _ in children(names[block], block) if (part := within(name)) > PART * size]
        parts += large
        small += size - sum(large)
    return Sizes(tuple(sizes), max(parts), small, total - sum(sizes))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a DiT are."""

    settings: OffloadConfig
    """As they were chosen: `enabled` is true or false."""
    device: int
    """Bytes on the device while the loop runs."""
    idle: int
    """Bytes on the device at other times."""
    host: int
    """Bytes in host memory, where that is not the device's."""
    reason: str


def place(settings: OffloadConfig, sizes: Sizes, device: DeviceInfo, keep_first: int = 0) -> Placement:
    """What `settings` come to, with `enabled` taken as it is; "auto" counts as true."""
    if not settings.enabled:
        return Placement(settings, sizes.total, sizes.total, 0, "off")
    if settings.granularity == "model":
        words, on_device, idle, away = "the whole model", sizes.total, 0, sizes.total
        host = away
    else:
        chosen = spread(len(sizes.blocks), settings.ratio, keep_first)
        moved = sum(sizes.blocks[index] for index in chosen)
        unit = max((sizes.blocks[index] for index in chosen), default=0)
        words = f"{len(chosen)} of {len(sizes.blocks)} blocks"
        if settings.granularity == "phase" and chosen:
            moved -= sizes.small * len(chosen) // len(sizes.blocks)
            unit, words = min(unit, sizes.part), f"the parts of {words}"
        idle = sizes.total - moved
        on_device, host = idle + 2 * unit, moved
        if settings.lazy_load:
            kept = min(int((settings.max_memory_gb or 0) * GIB), moved)
            host = kept + (0 if device.kind == "cpu" or kept == moved else 2 * unit)
            words += ", read from disk"
    if device.kind != "cpu":
        return Placement(settings, on_device, idle, host, words)
    if not settings.lazy_load:
        words += "; nothing is saved: the device's memory is the host's (lazy_load would)"
    return Placement(settings, on_device + host, idle + host, 0, words)


def decide(
    settings: OffloadConfig,
    sizes: Sizes,
    device: DeviceInfo,
    *,
    peak: Callable[[Placement], int],
    available: int,
    host_free: int,
    keep_first: int = 0,
    compiled: bool = False,
) -> Placement:
    """The placement of `settings`; for "auto" the mildest that fits, with a reason that says so.

    `peak` gives the bytes that the whole plan takes on the device at its peak with a placement, `available` those that
    it may take. Mild is what moves little: nothing, the whole model once per request, a share of the blocks, all
    blocks, parts of blocks, blocks from disk. Raises UserError when nothing fits.
    """
    if settings.enabled != "auto":
        return place(settings, sizes, device, keep_first)
    best: tuple[int, Placement] | None = None
    plain = peak(place(settings.model_copy(update={"enabled": False}), sizes, device))
    for candidate in _candidates(settings, sizes, device, compiled):
        placed = place(candidate, sizes, device, keep_first)
        needed = peak(placed)
        if needed <= available and placed.host <= host_free:
            if not candidate.enabled:
                return replace(placed, reason=f"auto: off, {human_bytes(needed)} of {human_bytes(available)} fit")
            why = f"{human_bytes(needed)} rather than {human_bytes(plain)}, of {human_bytes(available)}"
            return replace(placed, reason=f"auto: {placed.reason} ({why})")
        if best is None or needed < best[0]:
            best = needed, placed
    assert best is not None
    needed, placed = best
    raise UserError(
        "offload",
        f"no form of it fits: the one with the least on the device ({placed.reason}) needs {human_bytes(needed)} there "
        f"and {human_bytes(placed.host)} on the host; {human_bytes(available)} and {human_bytes(host_free)} are free",
        do="set unload_modules, a quantized mm_type, or a smaller video",
    )


def _candidates(settings: OffloadConfig, sizes: Sizes, device: DeviceInfo, compiled: bool) -> Iterator[OffloadConfig]:
    """The forms of offload, the mildest first; on a CPU only those that save anything."""
    count = len(sizes.blocks)
    ratios = [number / count for number in range(1, count + 1)]
    phases: Sequence[str] = () if compiled else ("phase",)
    forms: list[dict[str, Any]] = [{"enabled": False, "lazy_load": False}]
    if device.kind == "cpu":
        forms += [{"granularity": "block", "ratio": ratio, "lazy_load": True} for ratio in ratios]
    else:
        forms += [{"granularity": "model", "ratio": 1.0, "lazy_load": False}]
        forms += [{"granularity": "block", "ratio": ratio, "lazy_load": False} for ratio in ratios]
        forms += [{"granularity": phase, "ratio": 1.0, "lazy_load": False} for phase in phases]
        forms += [{"granularity": "block", "ratio": 1.0, "lazy_load": True}]
    forms += [{"granularity": phase, "ratio": 1.0, "lazy_load": True} for phase in phases]
    for form in forms:
        yield settings.model_copy(update={"enabled": True} | form)


def check_settings(settings: OffloadConfig, *, compiled: bool = False, graphs: bool = False) -> None:
    """Raise ConfigError for settings that contradict each other or `compile` and `graphs`."""
    if not settings.enabled:
        if settings.lazy_load:
            raise ConfigError("offload.lazy_load", "is true, but offload is off", do="set offload.enabled")
        return
    if graphs:
        raise ConfigError(
            "graphs",
            "a recorded graph reads weights where they were recorded, and offload moves them",
            do="set graphs or offload.enabled to false",
        )
    if settings.enabled == "auto":
        return
    if settings.granularity == "model" and settings.lazy_load:
        raise ConfigError(
            "offload.lazy_load", "reads blocks from disk, and granularity is 'model'", allowed="block, phase"
        )
    if settings.granularity == "model" and settings.ratio != 1:
        raise ConfigError("offload.ratio", "is a share of the blocks, and granularity is 'model'", allowed="1")
    if settings.granularity == "phase" and compiled:
        raise ConfigError(
            "offload.granularity",
            "'phase' exchanges weights inside of a block, which compile makes one graph",
            allowed="block, model",
        )
    if settings.max_memory_gb is not None and not settings.lazy_load:
        raise ConfigError("offload.max_memory_gb", "bounds what lazy_load keeps, which is off", do="set lazy_load")
