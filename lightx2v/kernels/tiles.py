"""Sizes of tiles, and which is fastest for a product on this card: measured once, and kept in the user's cache."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import triton
from loguru import logger

from lightx2v.kernels.interpreter import interpreting
from lightx2v.platform import compute_capability, device_name
from lightx2v.tables import Table

_TURNS = 5
_CALLS = 4
"""Calls between two readings of the clock, so that launches overlap as they do in use."""
_TABLE = Table("tiles.json")
_chosen: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut up. `halves` stores a tile in two parts, which take half of the shared memory each."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group: int = 8
    halves: bool = False
    descriptors: bool = True


_INTERPRETED = Tile(64, 64, 64, 1, 4, group=2)
_HOPPER = (
    Tile(128, 256, 128, 3, 8),
    Tile(128, 256, 128, 4, 8, halves=True),
    Tile(256, 128, 128, 3, 8),
    Tile(128, 128, 128, 4, 8),
    Tile(128, 128, 128, 4, 4),
    Tile(128, 256, 128, 3, 8, group=16),
    Tile(64, 128, 128, 5, 4),
    Tile(64, 256, 128, 4, 4),
)
_OLDER = (
    Tile(128, 128, 128, 3, 8, descriptors=False),
    Tile(128, 256, 64, 3, 8, descriptors=False),
    Tile(128, 128, 64, 4, 4, descriptors=False),
    Tile(64, 128, 128, 3, 4, descriptors=False),
    Tile(64, 64, 128, 4, 4, descriptors=False),
)


_HOPPER_ATTENTION = (
    Tile(128, 128, 0, 3, 8),
    Tile(128, 128, 0, 2, 8),
    Tile(128, 64, 0, 4, 8),
    Tile(128, 64, 0, 3, 4),
    Tile(64, 128, 0, 3, 4),
)
_OLDER_ATTENTION = (
    Tile(128, 64, 0, 3, 8, descriptors=False),
    Tile(128, 64, 0, 3, 4, descriptors=False),
    Tile(64, 64, 0, 3, 4, descriptors=False),
    Tile(128, 128, 0, 2, 8, descriptors=False),
)


def attention_candidates(device: torch.device) -> tuple[Tile, ...]:
    """Blocks of queries and of keys to try, both at most 128; `block_k` means nothing there."""
    if interpreting():
        return (_INTERPRETED,)
    return _HOPPER_ATTENTION if (compute_capability(device) or (0, 0)) >= (9, 0) else _OLDER_ATTENTION


def candidates(device: torch.device) -> tuple[Tile, ...]:
    """What to try for row scales, the usual best first."""
    if interpreting():
        return (_INTERPRETED,)
    return _HOPPER if (compute_capability(device) or (0, 0)) >= (9, 0) else _OLDER


def block_candidates(device: torch.device) -> tuple[Tile, ...]:
    """The same for scales of blocks: no tile is wider than a block, nor stored in halves."""
    narrow = (replace(tile, block_n=min(tile.block_n, 128), block_k=128, halves=False) for tile in candidates(device))
    return tuple(dict.fromkeys(narrow))


def key_of(kind: str, rows: int, columns: int, k: int, device: torch.device) -> str:
    """Products that share a tile: rows up to the same power of two, on cards of a name with this Triton."""
    upto = triton.next_power_of_2(rows)
    return f"{device_name(device)}, triton {triton.__version__}: {kind} {columns}x{k}, up to {upto} rows"


def fastest(key: str, tiles: Sequence[Tile], run: Callable[[Tile], object], device: torch.device) -> Tile:
    """The fastest of `tiles` for the product `run`; one that fails, say for lack of shared memory, is not taken.

    The choice is kept under `key` by the tile's words, so that a new list of candidates is measured anew.
    """
    if len(tiles) == 1:
        return tiles[0]
    words = f"{key}; {hash_of(tiles)}"
    if words not in _chosen:
        known = _TABLE.read()
        kept = known.get(words)
        if not isinstance(kept, int) or not 0 <= kept < len(tiles):
            logger.info("measuring tiles, once: {}", key)
            kept = _measure(tiles, run, device)
            _TABLE.write({**known, words: kept})
        _chosen[words] = kept
    return tiles[_chosen[words]]


def hash_of(tiles: Sequence[Tile]) -> str:
    """A word that changes with the list."""
    return f"{zlib.crc32(repr(tuple(tiles)).encode()):08x}"


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _measure(tiles: Sequence[Tile], run: Callable[[Tile], object], device: torch.device) -> int:
    times: dict[int, list[float]] = {}
    for index, tile in enumerate(tiles):
        try:
            run(tile)
            _wait(device)
        except Exception as error:  # whatever the compiler raises, the others are still there
            logger.debug("{} failed: {}", tile, error)
        else:
            times[index] = []
    if not times:
        return 0  # its failure shows when it is used
    for _ in range(_TURNS):
        for index in times:
            _wait(device)
            start = time.perf_counter()
            for _ in range(_CALLS):
                run(tiles[index])
            _wait(device)
            times[index].append(time.perf_counter() - start)
    return min(times, key=lambda index: median(times[index]))
