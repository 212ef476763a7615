"""One quantized linear layer, here and in optimum-quanto, in turns in one process: time and memory on a CPU.

    python benchmarks/quanto_linear.py --weights qint8 qint4 --rows 256 --size 4096 4096

Run it with the Python of an environment that has optimum-quanto and lightx2v's dependencies. Memory is what the peak
of a process of its own rises by during one call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("qint8", "qint4", "qint2", "qfloat8")
PACKAGES = ("lightx2v", "optimum-quanto")


def layer(package: str, kind: str, n: int, k: int) -> Callable[[Tensor], Any]:
    """A frozen bfloat16 layer of a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, dtype=torch.bfloat16))
    if package == "lightx2v":
        from lightx2v.integrations import quanto as library
    else:
        from optimum import quanto as library
    library.quantize(model, weights=getattr(library, kind))
    library.freeze(model)
    return model


@torch.no_grad()
def rise(package: str, kind: str, n: int, k: int, rows: int) -> float:
    """MiB that the peak rises by during a call."""
    run, x = layer(package, kind, n, k), torch.randn(rows, k, dtype=torch.bfloat16)
    run(x[:1])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew at what is resident now
    before = _status("VmHWM")
    run(x)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))


@torch.no_grad()
def times(kind: str, n: int, k: int, rows: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, and of bfloat16, in turns."""
    x = torch.randn(rows, k, dtype=torch.bfloat16)
    runs: dict[str, Callable[[Tensor], Any]] = {package: layer(package, kind, n, k) for package in PACKAGES}
    runs["bfloat16"] = nn.Linear(k, n, dtype=torch.bfloat16)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run(x)
            if repeat:
                found[name].append(1000 * (time.perf_counter() - began))
    return {name: median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--size", type=int, nargs=2, default=[4096, 4096], metavar=("N", "K"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rise", nargs=3, metavar=("PACKAGE", "KIND", "ROWS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    n, k = given.size
    if given.rise:
        print(rise(given.rise[0], given.rise[1], n, k, int(given.rise[2])))
        return
    for kind in given.weights:
        for rows in given.rows:
            row: dict[str, Any] = {"weights": kind, "rows": rows, "ms": times(kind, n, k, rows, given.repeats)}
            row["peak_rise_mib"] = {package: _apart(package, kind, rows, given) for package in PACKAGES}
            print(json.dumps(row), flush=True)


def _apart(package: str, kind: str, rows: int, given: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--size", *map(str, given.size), "--threads", str(given.threads)]
    done = subprocess.run([*command, "--rise", package, kind, str(rows)], capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]), 1)


if __name__ == "__main__":
    main()
