"""The rows of `caches.py`: settings of our caches, and beside which settings of a peer they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_peers
from cache_peers import PeerCache

from lightx2v.calibrate.fit import Fit
from lightx2v.features.cache import Calibration

Method = tuple[str, dict[str, Any]]
"""A name for the table, and settings of `cache`."""

WARMUP = 4
"""Of DBCache, here and there."""


@dataclass(frozen=True)
class Comparison:
    """A method as peers have it, and ours at settings around theirs; `by` is what is equal: forwards, or operations."""

    title: str
    peers: tuple[PeerCache, ...]
    ours: tuple[Method, ...]
    by: str = "forwards"
    beside: tuple[Method, ...] = ()
    """Ours with other options: shown, and not compared."""


def methods(file: Path, fits: Mapping[str, Fit]) -> list[Method]:
    """Ours. TeaCache's thresholds are those by which half of the steps are computed."""
    known = {"file": str(file)}
    head, ret = (round(fits[name].threshold(0.5), 4) for name in ("head", "blocks"))
    return [
        (f"`teacache`, {head:g}", {"type": "teacache", "threshold": head, **known}),
        (
            f"`teacache`, {ret:g}, `use_ret_steps`",
            {"type": "teacache", "threshold": ret, "use_ret_steps": True, **known},
        ),
        (f"`custom`, {head:g}", {"type": "custom", "threshold": head, **known}),
        mag(0.12, 2, file),
        ("`magcache`, `store` fp8", {"type": "magcache", "store": "fp8", **known}),
        mag(0.24, 4, file),
        with_option(mag(0.24, 4, file), "taylor"),
        taylor(2),
        taylor(4),
        taylor(2, lite=True),
        taylor(4, lite=True),
        first_block(0.1),
        dual_block(1, 0, 0.15),
        dual_block(1, 0, 0.15, seer=True),
        ("`adacache`", {"type": "adacache"}),
        ("`easycache`, `warmup` 5", {"type": "easycache", "warmup": 5}),
        ("`fora`", {"type": "fora"}),
        pyramid(2),
        gate(0.5),
        gate(0.1, 3),
        gate(0.5, 3),
        gate(0.5, 3, taylor(2)),
    ]


def mag(threshold: float, max_skip: int, file: Path) -> Method:
    settings = {"type": "magcache", "threshold": threshold, "max_skip": max_skip, "file": str(file)}
    return f"`magcache`, {threshold:g}, `max_skip` {max_skip}", settings


def taylor(interval: int, warmup: int = 1, lite: bool = False) -> Method:
    more = (", `lite`" if lite else "") + (f", `warmup` {warmup}" if warmup > 1 else "")
    settings = {"type": "taylorseer", "interval": interval, "warmup": warmup, "lite": lite}
    return f"`taylorseer`, `interval` {interval}{more}", settings


def first_block(threshold: float) -> Method:
    return f"`fbcache`, {threshold:g}", {"type": "fbcache", "threshold": threshold}


def with_option(method: Method, option: str) -> Method:
    """The method with a switch on."""
    name, settings = method
    return f"{name}, `{option}`", {**settings, option: True}


def dual_block(first: int, last: int, threshold: float, seer: bool = False) -> Method:
    settings = {"first_blocks": first, "last_blocks": last, "warmup": WARMUP, "threshold": threshold}
    plain = f"`dbcache`, F{first}B{last}, {threshold:g}", {"type": "dbcache", **settings}
    return with_option(plain, "taylor") if seer else plain


def pyramid(interval: int) -> Method:
    return f"`pab`, `interval` {interval}", {"type": "pab", "interval": interval}


def gate(share: float, again: int | None = None, beside: Method = ("", {})) -> Method:
    name, settings = beside
    parts = (f"`cfg_gate` {share:g}", f"`cfg_interval` {again}" if again else "", name)
    return ", ".join(filter(None, parts)), {"cfg_gate": share, "cfg_interval": again, **settings}


def comparisons(known: Calibration, file: Path, absent: Mapping[str, str]) -> list[Comparison]:
    peers, steps, scan, dit = cache_peers, known.steps, (0.1, 0.15, 0.2), "cache_dit" not in absent
    often, seldom, mags = (2, 1), (4, 3), (mag(0.12, 2, file), mag(0.24, 4, file))
    found = [
        Comparison(
            "First block",
            (*map(peers.first_block, scan), *(peers.dual_block(1, 0, 0, 0.15, steps) for _ in range(dit))),
            tuple(map(first_block, (0.08, *scan))),
            beside=(with_option(first_block(0.15), "cfg_separate"),),
        ),
        Comparison(
            "MagCache",
            tuple(peers.mag(threshold, skip, steps, known) for threshold, skip in ((0.12, 2), (0.24, 4))),
            mags,
            beside=(with_option(mags[1], "cfg_separate"), *(with_option(method, "taylor") for method in mags)),
        ),
        *(
            Comparison(
                "TaylorSeer, of the output" if lite else "TaylorSeer, of the blocks",
                (peers.taylor(*often, lite), peers.taylor(*seldom, lite)),
                (taylor(*often, lite), taylor(*seldom, lite)),
            )
            for lite in (False, True)
        ),
        Comparison("Attention", (peers.pyramid(2, True), peers.pyramid(2, False)), (pyramid(2),), "operations"),
        Comparison(
            "Guidance",
            (peers.faster(5),),
            (gate(0.3, 2), gate(0.35, 3), gate(0.1, 3)),
            "operations",
            (gate(0.65), gate(0.5, 3)),
        ),
    ]
    for first, last, seer in ((1, 0, False), (1, 0, True), (2, 1, True)) if dit else ():
        found.append(
            Comparison(
                f"Dual block, F{first}B{last}" + (", extrapolated" if seer else ""),
                tuple(peers.dual_block(first, last, WARMUP, threshold, steps, seer) for threshold in scan),
                tuple(dual_block(first, last, threshold, seer) for threshold in scan),
            )
        )
    return found


def wanted(title: str, words: Sequence[str] | None) -> bool:
    return words is None or any(word.lower() in title.lower() for word in words)
