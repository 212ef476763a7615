"""What each feature cache saves and costs on tiny-wan, beside diffusers' and cache-dit's own: tables in Markdown.

    python benchmarks/caches.py --prompts 50

Coefficients and ratios come from `lightx2v calibrate --cache` on other prompts, before. Then for every prompt all rows
take turns, with a plain run before every fourth: a speed-up is the plain run's time of denoising over the row's, both
of one prompt, and the median of all prompts. A peer's rows are held against a plain run of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cache_peers
import numpy as np
import torch
from cache_peers import PeerCache, PeerModel
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from lightx2v.calibrate.cli import calibrate_cache
from lightx2v.calibrate.fit import Fit
from lightx2v.config.load import load_config
from lightx2v.denoising import denoise_request
from lightx2v.eval.detector import detect
from lightx2v.eval.metrics import psnr
from lightx2v.eval.prompts import ATTRIBUTES, Case, draw_prompts
from lightx2v.eval.results import Report, Result
from lightx2v.families.base import Session
from lightx2v.features.cache import Calibration
from lightx2v.models.base import Branch, Conditions
from lightx2v.plan import Plan, resolve
from lightx2v.platform import select_device
from lightx2v.request import Request as Job
from lightx2v.runner import Runner, to_frames

Denoise = Callable[[Job, Mapping[Branch, Conditions]], Tensor]
Parts = Sequence[Mapping[str, nn.Module]]
"""For each block what runs when its attention ("self", "cross") and its feed-forward ("mlp") are computed."""
Method = tuple[str, dict[str, Any]]
"""A name for the table, and settings of `cache`."""

ROWS_PER_PLAIN = 4
WARMUP = 4
"""Of DBCache, here and there."""
OURS, THEIRS = "lightx2v", "diffusers' model"
THEIRS_BATCHED = f"{THEIRS}, branches in a batch"


@dataclass
class Row:
    """One way to denoise, and what it did to each prompt."""

    name: str
    denoise: Denoise
    parts: Parts
    plain: str
    """Name of the row that it is held against; its own for a plain run."""
    setting: str = ""
    results: list[Result] = field(default_factory=list)
    psnrs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        names = ("name", "setting", "plain", "psnrs", "seconds", "speedups", "forwards", "work")
        return {name: getattr(self, name) for name in names} | {"right": self.right()}

    def right(self) -> dict[str, int]:
        return Report(tuple(self.results), 0.0).right()


@contextmanager
def counted(parts: Parts) -> Iterator[list[dict[str, int]]]:
    """How often each part of each block is computed inside, for one sample."""
    counts = [dict.fromkeys(block, 0) for block in parts]

    def hook(of_block: dict[str, int], part: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            of_block[part] += len(args[0])

        return count

    handles = [
        module.register_forward_pre_hook(hook(counts[index], part))
        for index, block in enumerate(parts)
        for part, module in block.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def operations(plan: Plan) -> dict[str, int]:
    """Of the parts of a block for one forward; keys and values of the text are made once a request and do not count."""
    arch, job = plan.files.arch, plan.request
    _, frames, height, width = plan.family.latent_shape(job.height, job.width, job.frames)
    tokens = frames * height * width // int(np.prod(arch.patch_size))
    linear, attend = 2 * tokens * arch.dim, 4 * tokens * arch.dim
    return {
        "self": 4 * linear * arch.dim + attend * tokens,
        "cross": 2 * linear * arch.dim + attend * arch.text_len,
        "mlp": 2 * linear * arch.ffn_dim,
    }


class Bench:
    """tiny-wan with its encoder and VAE, and the rows."""

    def __init__(self, settings: Sequence[str]) -> None:
        self.settings = list(settings)
        self.plan = self.planned({})
        self.runner = Runner(self.plan)
        device, dtype = torch.device(self.plan.device.torch_name), getattr(torch, self.plan.config.dtype)
        runner, files = self.runner, self.plan.files
        self.session = Session(runner.components, runner.timer, self.plan.config, files, device, dtype)
        self.costs = operations(self.plan)
        self.rows: dict[str, Row] = {}
        self._ours = np.empty(0, np.uint8)

    def planned(self, cache: Mapping[str, Any]) -> Plan:
        config = load_config(None, {f"cache.{name}": value for name, value in cache.items()}, self.settings)
        return resolve(config, select_device(config.device))

    def add(self, row: Row) -> None:
        self.rows.setdefault(row.name if not row.setting else f"{row.name}: {row.setting}", row)

    def add_ours(self, name: str, cache: Mapping[str, Any]) -> None:
        plan = self.planned(cache)
        with self.session.use("dit") as loaded:
            blocks = loaded.model.blocks

        def denoise(job: Job, conditions: Mapping[Branch, Conditions]) -> Tensor:
            return denoise_request(plan, loaded, job, conditions, quiet=True)

        parts = [{"self": block.self_attn, "cross": block.cross_attn, "mlp": block.ffn} for block in blocks]
        self.add(Row(name, denoise, parts, OURS))

    def add_peer(self, cache: PeerCache) -> None:
        plain = THEIRS_BATCHED if cache.batched else THEIRS
        if plain not in self.rows:
            model = PeerModel(self.plan, PeerCache(plain, "", batched=cache.batched))
            self.add(Row(plain, model.run, model.parts, plain))
        model = PeerModel(self.plan, cache)
        self.add(Row(cache.name, model.run, model.parts, plain, cache.setting))

    @torch.inference_mode()
    def run(self, requests: Sequence[Case]) -> None:
        """Every row on every request."""
        groups = {plain: [row for row in self.rows.values() if row.plain == plain] for plain in self.rows}
        for request in tqdm(requests, desc="caches", unit="prompt"):
            job = replace(self.plan.request, prompt=request.prompt, seed=request.seed)
            conditions = self.runner.family.encode(self.session, job)
            for plain, rows in groups.items():
                self._group(self.rows[plain], [row for row in rows if row.name != plain], request, job, conditions)

    def _group(self, plain: Row, rows: Sequence[Row], request: Case, job: Job, conditions: Any) -> None:
        if not rows:
            return
        reference: np.ndarray | None = None
        for index, row in enumerate(rows):
            if index % ROWS_PER_PLAIN == 0:
                latents, plain_seconds = self._timed(plain, job, conditions)
                if reference is None:
                    reference = self._look(plain, request, latents)
                    if plain.name == OURS:
                        self._ours = reference
                    else:
                        plain.psnrs.append(psnr(reference, self._ours))
            latents, seconds = self._timed(row, job, conditions)
            row.speedups.append(plain_seconds / seconds)
            assert reference is not None
            row.psnrs.append(psnr(self._look(row, request, latents), reference))

    def _timed(self, row: Row, job: Job, conditions: Any) -> tuple[Tensor, float]:
        with counted(row.parts) as counts:
            began = time.perf_counter()
            latents = row.denoise(job, conditions)
            seconds = time.perf_counter() - began
        row.seconds.append(seconds)
        middle = counts[len(counts) // 2]
        row.forwards.append(min(middle.values()))
        row.work.append(sum(self.costs[part] * count for block in counts for part, count in block.items()))
        return latents, seconds

    def _look(self, row: Row, request: Case, latents: Tensor) -> np.ndarray:
        frames = to_frames(self.runner.family.decode(self.session, latents))
        row.results.append(Result(request, detect(frames)))
        return frames

    @property
    def forwards(self) -> float:
        """Of a run without a cache."""
        return statistics.fmean(self.rows[OURS].forwards)

    def share(self, row: Row) -> float:
        """The row's operations over those of a run without a cache."""
        return statistics.fmean(row.work) / statistics.fmean(self.rows[OURS].work)


@dataclass(frozen=True)
class Comparison:
    """A method as peers have it, and ours at settings around theirs; `by` is what is equal: forwards, or operations."""

    title: str
    peers: tuple[PeerCache, ...]
    ours: tuple[Method, ...]
    by: str = "forwards"


def calibrated(bench: Bench, tested: Sequence[Case], count: int, file: Path) -> tuple[Calibration, dict[str, Fit]]:
    """Coefficients and ratios in `file`, from `count` prompts that are none of `tested`."""
    seen = {request.scene for request in tested}
    drawn = dict.fromkeys(request.prompt for request in draw_prompts(50 * count, 1) if request.scene not in seen)
    made, fits = calibrate_cache(bench.plan, list(drawn)[:count])
    made.write(file)
    return made, fits


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


def dual_block(first: int, last: int, threshold: float, seer: bool = False) -> Method:
    settings = {"first_blocks": first, "last_blocks": last, "warmup": WARMUP, "threshold": threshold, "taylor": seer}
    return f"`dbcache`, F{first}B{last}, {threshold:g}{', `taylor`' if seer else ''}", {"type": "dbcache", **settings}


def pyramid(interval: int) -> Method:
    return f"`pab`, `interval` {interval}", {"type": "pab", "interval": interval}


def gate(share: float, again: int | None = None, beside: Method = ("", {})) -> Method:
    name, settings = beside
    parts = (f"`cfg_gate` {share:g}", f"`cfg_interval` {again}" if again else "", name)
    return ", ".join(filter(None, parts)), {"cfg_gate": share, "cfg_interval": again, **settings}


def comparisons(known: Calibration, file: Path, absent: Mapping[str, str]) -> list[Comparison]:
    peers, steps, scan, dit = cache_peers, known.steps, (0.1, 0.15, 0.2), "cache_dit" not in absent
    often, seldom = (2, 1), (4, 3)
    found = [
        Comparison(
            "First block",
            (*map(peers.first_block, scan), *(peers.dual_block(1, 0, 0, 0.15, steps) for _ in range(dit))),
            tuple(map(first_block, scan)),
        ),
        Comparison(
            "MagCache",
            tuple(peers.mag(threshold, skip, steps, known) for threshold, skip in ((0.12, 2), (0.24, 4))),
            (mag(0.12, 2, file), mag(0.24, 4, file)),
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
            (gate(0.65), gate(0.35, 3), gate(0.5, 3)),
            "operations",
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


def cells(bench: Bench, row: Row) -> list[str]:
    """Forwards, operations, speed-ups, PSNR and adherence."""
    share, right, count = bench.share(row), row.right(), len(row.results)
    shown = " ".join(str(right[name]) for name in ATTRIBUTES) if right["all"] < count else "all"
    quality = [f"{statistics.fmean(row.psnrs):.2f} dB", f"{min(row.psnrs):.2f} dB"] if row.psnrs else ["", ""]
    speed = [f"{1 / share:.2f}x", f"{statistics.median(row.speedups):.2f}x"] if row.speedups else ["", ""]
    return [f"{statistics.fmean(row.forwards):.1f}", f"{share:.0%}", *speed, *quality, shown]


TITLES = "forwards | operations | the ideal | speed-up | PSNR mean | lowest | right"


def table(titles: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {titles} |", "|---" * (titles.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def at(bench: Bench, row: Row, ours: Sequence[Row], by: str) -> float:
    """Our mean PSNR at as many forwards, or operations, as `row` has: on the line between the nearest of our rows on
    both sides, or of the one at the end of them. NaN where all of ours have more by over a fiftieth."""

    def place(of: Row) -> float:
        return statistics.fmean(of.forwards) / bench.forwards if by == "forwards" else bench.share(of)

    points = sorted((place(of), statistics.fmean(of.psnrs)) for of in ours)
    where, quality = zip(*points, strict=True)
    here = place(row)
    return float(np.interp(here, where, quality)) if here >= where[0] - 0.02 else float("nan")


def report(bench: Bench, own: Sequence[Method], compared: Sequence[Comparison]) -> str:
    """All tables."""
    rows = [bench.rows[OURS], *(bench.rows[name] for name, _ in own)]
    text = [table(f"method | {TITLES}", [[row.name, *cells(bench, row)] for row in rows])]
    text.append(f"{OURS} without a cache: {statistics.median(rows[0].seconds):.2f} s of denoising")
    for comparison in compared:
        ours = [bench.rows[name] for name, _ in comparison.ours]
        lines = []
        for peer in comparison.peers:
            row = bench.rows[f"{peer.name}: {peer.setting}"]
            found = at(bench, row, ours, comparison.by)
            more = found - statistics.fmean(row.psnrs)
            lines.append([f"{row.name}, {row.setting}", *cells(bench, row), f"{found:.2f} dB", f"{more:+.2f} dB"])
        lines += [[f"ours: {row.name}", *cells(bench, row), "", ""] for row in ours]
        titles = f"method | {TITLES} | ours at these {comparison.by} | more"
        text.append(f"### {comparison.title}\n\n" + table(titles, lines))
    for plain in (THEIRS, THEIRS_BATCHED):
        if psnrs := bench.rows[plain].psnrs if plain in bench.rows else []:
            text.append(f"{plain} without a cache, against ours: {statistics.fmean(psnrs):.2f} dB, {min(psnrs):.2f} dB")
    return "\n\n".join(text)


def wanted(title: str, words: Sequence[str] | None) -> bool:
    return words is None or any(word.lower() in title.lower() for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of the prompts")
    parser.add_argument("--calibrate", type=int, default=16, metavar="N", help="prompts that coefficients come from")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="run the peers as well")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows and comparisons with such a word in their title"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every prompt there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="any setting; repeatable")
    args = parser.parse_args()
    logger.remove()
    torch.set_num_threads(args.threads)
    requests, bench = draw_prompts(args.prompts, args.seed), Bench(args.set)
    absent = cache_peers.missing() if args.peers else {"diffusers": "left out"}
    with TemporaryDirectory() as folder:
        file = Path(folder, "calibration.json")
        known, fits = calibrated(bench, requests, args.calibrate, file)
        own = [method for method in methods(file, fits) if wanted(method[0], args.only)]
        every = [] if "diffusers" in absent else comparisons(known, file, absent)
        compared = [comparison for comparison in every if wanted(comparison.title, args.only)]
        bench.add_ours(OURS, {})
        for name, cache in (*own, *(method for comparison in compared for method in comparison.ours)):
            bench.add_ours(name, cache)
        for comparison in compared:
            for peer in comparison.peers:
                bench.add_peer(peer)
    bench.run(requests)
    print(report(bench, own, compared))
    for name, reason in absent.items():
        print(f"\n{name}: {reason}")
    if args.json:
        figures = {"calibration": asdict(known), "rows": [row.to_json() for row in bench.rows.values()]}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
