"""What h200.sh shows. A section that fails is reported, and one that takes too long is cut; the others still run."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Collection
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from h200_common import DRY, Bench, Row, Section, Sizes
from h200_kernels import attentions, check, linears, quantizers
from h200_models import encoders, forwards, offload, peers, quality, vae
from loguru import logger

from lightx2v.bench.host import describe, hardware, versions
from lightx2v.bench.roofline import peaks
from lightx2v.platform import empty_cache, select_device

SECONDS = 530.0
"""Of everything; the ceilings and what stands before them take about 20."""
SECTIONS: dict[str, tuple[Section, float]] = {
    "correct": (check, 45.0),
    "quantize": (quantizers, 15.0),
    "linear": (linears, 55.0),
    "attention": (attentions, 50.0),
    "forward": (forwards, 95.0),
    "quality": (quality, 25.0),
    "offload": (offload, 50.0),
    "vae": (vae, 75.0),
    "encoders": (encoders, 20.0),
    "peers": (peers, 80.0),
}
"""In order, with the seconds of each. What one leaves is the next ones'; no row is begun after a section's time."""


def run(bench: Bench, began: float, only: Collection[str]) -> tuple[list[Row], dict[str, str], dict[str, float]]:
    """The figures, why sections failed or were cut, and the seconds of each."""
    rows = [Row("roofline", "copy", bench.top.bytes_per_s / 1e9, "GB/s")]
    rows += [Row("roofline", name, rate / 1e12, "TFLOP/s") for name, rate in bench.top.flops_per_s.items()]
    failed: dict[str, str] = {}
    taken: dict[str, float] = {}
    planned = 20.0
    for name in only:
        section, seconds = SECTIONS[name]
        start, planned = time.perf_counter(), planned + seconds
        until = began + min(planned, SECONDS)
        if start > until and not bench.sizes.dry:
            failed[name] = "no time was left"
            continue
        try:
            with closing(section(bench)) as found:  # type: ignore[type-var]
                for row in found:
                    rows.append(row)
                    print(line(row), flush=True)
                    if time.perf_counter() > until and not bench.sizes.dry:
                        failed[name] = f"cut after {time.perf_counter() - start:.0f} s"
                        break
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            traceback.print_exc()
            if name == "correct" and not bench.sizes.dry:
                print("the figures below are of kernels that are not right", flush=True)
        empty_cache(bench.device)
        taken[name] = time.perf_counter() - start
    return rows, failed, taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with small sizes, in Triton's interpreter")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAMES", help="sections (default: %(default)s)")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := set(only) - SECTIONS.keys():
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    began = time.perf_counter()
    device, sizes = select_device("cpu" if args.dry_run else "auto"), DRY if args.dry_run else Sizes()
    found = hardware(device)
    rows, failed, taken = run(Bench(device, sizes, peaks(device, sizes.timing)), began, only)
    about = [describe(found), ", ".join(f"{k} {v}" for k, v in versions(("triton", "torchao")).items())]
    about.append("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in taken.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "dry_run": args.dry_run, "rows": [asdict(row) for row in rows], "failed": failed}
    (args.out / "h200.json").write_text(json.dumps(content, indent=1), "utf-8")
    (args.out / "h200.md").write_text(markdown(about, rows, failed), "utf-8")
    print(about[-1])
    seconds = time.perf_counter() - began
    print(f"{len(rows)} figures, {len(failed)} sections not whole: {failed or 'none'}; {seconds:.0f} s")
    return 1 if failed else 0


def line(row: Row) -> str:
    """A row as text."""
    of = "" if row.share is None else f", {row.share:.0%} of the ceiling"
    target = f" (target: {row.target})" if row.target else ""
    return f"{row.section}: {row.name}: {row.value:.4g} {row.unit}{of}{target}"


def markdown(about: list[str], rows: list[Row], failed: dict[str, str]) -> str:
    """The table."""
    lines = [*(f"- {text}" for text in about), *(f"- {name}: {why}" for name, why in failed.items()), ""]
    lines += ["| | | figure | of the ceiling | target |", "|---|---|---:|---:|---|"]
    for row in rows:
        of = "" if row.share is None else f"{row.share:.0%}"
        lines.append(f"| {row.section} | {row.name} | {row.value:.4g} {row.unit} | {of} | {row.target} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
