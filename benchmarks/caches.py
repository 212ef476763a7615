"""What each feature cache saves and costs on tiny-wan, beside diffusers' and cache-dit's own: tables in Markdown.

    python benchmarks/caches.py --prompts 50

Coefficients and ratios come from `lightx2v calibrate --cache` on other prompts, before. Then for every prompt all rows
take turns, with a plain run before every fourth: a speed-up is the plain run's time of denoising over the row's, both
of one prompt, and the median of all prompts. A peer's rows are held against a plain run of its own. With `--set
dtype=float32` rounding moves no decision, and what remains between two rows is what their methods do. Several
`--workers` share the prompts; the times of all are longer then, those of plain runs as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cache_methods
import cache_peers
import numpy as np
import torch
from cache_methods import Comparison, Method, wanted
from cache_peers import PeerCache, PeerModel
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from lightx2v.calibrate.cache import calibrate_cache
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
CLIPS_AT_ONCE = 16
SAME = 100.0
"""PSNR in dB of two clips without any difference, and the most that counts."""
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

    def figures(self) -> dict[str, list[Any]]:
        """All that was measured, by name."""
        names = ("results", "psnrs", "seconds", "speedups", "forwards", "work")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        measured = {name: values for name, values in self.figures().items() if name != "results"}
        return {"name": self.name, "setting": self.setting, "plain": self.plain, **measured, "right": self.right()}

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


def planned(settings: Sequence[str], cache: Mapping[str, Any]) -> Plan:
    """tiny-wan with this cache."""
    config = load_config(None, {f"cache.{name}": value for name, value in cache.items()}, list(settings))
    return resolve(config, select_device(config.device))


class Bench:
    """tiny-wan with its encoder and VAE, and the rows."""

    def __init__(self, settings: Sequence[str], every: int = 4) -> None:
        self.settings, self.every = list(settings), every
        self.plan = planned(self.settings, {})
        self.runner = Runner(self.plan)
        device, dtype = torch.device(self.plan.device.torch_name), getattr(torch, self.plan.config.dtype)
        runner, files = self.runner, self.plan.files
        self.session = Session(runner.components, runner.timer, self.plan.config, files, device, dtype)
        self.costs = operations(self.plan)
        self.rows: dict[str, Row] = {}
        self._ours = np.empty(0, np.uint8)

    def add(self, row: Row) -> None:
        self.rows.setdefault(row.name if not row.setting else f"{row.name}: {row.setting}", row)

    def add_ours(self, name: str, cache: Mapping[str, Any]) -> None:
        plan = planned(self.settings, cache)
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

    def take(self, measured: Sequence[Mapping[str, Sequence[Any]]]) -> None:
        """Add what another process has measured on other prompts, by row."""
        for row, figures in zip(self.rows.values(), measured, strict=True):
            for name, values in figures.items():
                getattr(row, name).extend(values)

    def _group(self, plain: Row, rows: Sequence[Row], request: Case, job: Job, conditions: Any) -> None:
        if not rows:
            return
        made: list[Tensor] = []
        for index, row in enumerate(rows):
            if index % self.every == 0:
                latents, plain_seconds = self._timed(plain, job, conditions)
                made = made or [latents]
            latents, seconds = self._timed(row, job, conditions)
            made.append(latents)
            row.speedups.append(plain_seconds / seconds)
        reference, *clips = self._decode(made)
        if plain.name == OURS:
            self._ours = reference
        else:
            plain.psnrs.append(min(psnr(reference, self._ours), SAME))
        plain.results.append(Result(request, detect(reference)))
        for row, clip in zip(rows, clips, strict=True):
            row.psnrs.append(min(psnr(clip, reference), SAME))
            row.results.append(Result(request, detect(clip)))

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

    def _decode(self, latents: Sequence[Tensor]) -> list[np.ndarray]:
        """Clips, several at a time, which takes a third of the time. None alone, which other kernels would decode."""
        batches = torch.cat(list(latents)).chunk(-(-len(latents) // CLIPS_AT_ONCE))
        return [to_frames(clip[None]) for batch in batches for clip in self.runner.family.decode(self.session, batch)]

    @property
    def forwards(self) -> float:
        """Of a run without a cache."""
        return statistics.fmean(self.rows[OURS].forwards)

    def share(self, row: Row) -> float:
        """The row's operations over those of a run without a cache."""
        return statistics.fmean(row.work) / statistics.fmean(self.rows[OURS].work)


def calibrated(args: argparse.Namespace, file: Path) -> dict[str, Fit]:
    """Coefficients and ratios in `file`, from prompts that are none of those tested."""
    seen = {request.scene for request in draw_prompts(args.prompts, args.seed)}
    drawn = draw_prompts(50 * args.calibrate, 1)
    prompts = list(dict.fromkeys(request.prompt for request in drawn if request.scene not in seen))
    made, fits = calibrate_cache(planned(args.set, {}), prompts[: args.calibrate])
    made.write(file)
    return fits


def rows(
    args: argparse.Namespace, file: Path, fits: Mapping[str, Fit]
) -> tuple[Bench, list[Method], list[Comparison], dict[str, str]]:
    """All rows, which of them are ours, what is compared, and the peers that are absent with the reason."""
    bench = Bench(args.set, args.plain_every)
    absent = cache_peers.missing() if args.peers else {"diffusers": "left out"}
    own = [method for method in cache_methods.methods(file, fits) if wanted(method[0], args.only)]
    every = [] if "diffusers" in absent else cache_methods.comparisons(Calibration.read(file), file, absent)
    compared = [comparison for comparison in every if wanted(comparison.title, args.only)]
    bench.add_ours(OURS, {})
    for name, cache in (*own, *(made for one in compared for made in (*one.ours, *one.beside))):
        bench.add_ours(name, cache)
    for comparison in compared:
        for peer in comparison.peers:
            bench.add_peer(peer)
    return bench, own, compared, absent


def share_of(args: argparse.Namespace, file: Path, fits: Mapping[str, Fit], index: int) -> list[dict[str, list[Any]]]:
    """What a worker measures on every so many of the prompts, by row."""
    logger.remove()
    torch.set_num_threads(args.threads)
    bench = rows(args, file, fits)[0]
    bench.run(draw_prompts(args.prompts, args.seed)[index :: args.workers])
    return [row.figures() for row in bench.rows.values()]


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


def at(bench: Bench, row: Row, ours: Sequence[Row], by: str) -> list[float]:
    """Our PSNR for each prompt at as many forwards, or operations, as `row` has: on the line between the nearest of our
    rows on both sides, or of the one at the end of them. NaN where all of ours have more by over a fiftieth."""

    def place(of: Row) -> float:
        return statistics.fmean(of.forwards) / bench.forwards if by == "forwards" else bench.share(of)

    points = sorted(ours, key=place)
    where, here = [place(of) for of in points], place(row)
    if here < where[0] - 0.02:
        return [float("nan")] * len(row.psnrs)
    weights = [np.interp(here, where, shares) for shares in np.eye(len(points))]
    quality: list[float] = np.average([of.psnrs for of in points], axis=0, weights=weights).tolist()
    return quality


def difference(found: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean of the differences prompt by prompt, and twice its standard error: about the 95 % interval."""
    more = [mine - other for mine, other in zip(found, theirs, strict=True)]
    error = f" ± {2 * statistics.stdev(more) / len(more) ** 0.5:.3f}" if len(more) > 1 else ""
    return f"{statistics.fmean(more):+.3f}{error} dB"


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
            last = f"{statistics.fmean(found):.2f} dB", difference(found, row.psnrs)
            lines.append([f"{row.name}, {row.setting}", *cells(bench, row), *last])
        lines += [[f"ours: {row.name}", *cells(bench, row), "", ""] for row in ours]
        lines += [
            [f"beside: {bench.rows[name].name}", *cells(bench, bench.rows[name]), "", ""]
            for name, _ in comparison.beside
        ]
        titles = f"method | {TITLES} | ours at these {comparison.by} | more"
        text.append(f"### {comparison.title}\n\n" + table(titles, lines))
    for plain in (THEIRS, THEIRS_BATCHED):
        if psnrs := bench.rows[plain].psnrs if plain in bench.rows else []:
            text.append(f"{plain} without a cache, against ours: {statistics.fmean(psnrs):.2f} dB, {min(psnrs):.2f} dB")
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of the prompts")
    parser.add_argument("--calibrate", type=int, default=16, metavar="N", help="prompts that coefficients come from")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="run the peers as well")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows and comparisons with such a word in their title"
    )
    parser.add_argument(
        "--plain-every",
        type=int,
        default=4,
        metavar="N",
        help="a plain run before every N-th row, by which the speed-ups are",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, each with its part of the prompts")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every prompt there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="any setting; repeatable")
    args = parser.parse_args()
    logger.remove()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        file = Path(folder, "calibration.json")
        fits = calibrated(args, file)
        bench, own, compared, absent = rows(args, file, fits)
        if args.workers == 1:
            bench.run(draw_prompts(args.prompts, args.seed))
        else:
            with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
                parts = range(args.workers)
                for part in pool.map(share_of, *zip(*((args, file, fits, index) for index in parts), strict=True)):
                    bench.take(part)
        known = Calibration.read(file)
    print(report(bench, own, compared))
    for name, reason in absent.items():
        print(f"\n{name}: {reason}")
    if args.json:
        figures = {"calibration": asdict(known), "rows": [row.to_json() for row in bench.rows.values()]}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
