"""`lightx2v bench linear`: quantize and multiply, per library and shape, against torch's bfloat16 product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor, nn

from lightx2v.bench import work
from lightx2v.bench.measure import Candidate, Entry, Facts, Kind, Timing, Work, allow_many_compilations, measure
from lightx2v.bench.peers.base import Choice
from lightx2v.bench.report import Case, Column, fact
from lightx2v.bench.shapes import Shape
from lightx2v.mm.linear import swap_linears
from lightx2v.platform import DeviceInfo

BASELINE = "torch bfloat16"
_SAMPLE_SECONDS = 0.02
"""A sample of a small product is the mean of as many calls as take this long."""


class OneLinear(nn.Module):
    """The smallest model: what the engine and the peers exchange the layer of."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]"""
        out: Tensor = self.linear(x)
        return out


@dataclass(slots=True)
class Layers:
    """Every way to compute the layer of one shape. Each is built once, for all numbers of rows."""

    shape: Shape
    device: DeviceInfo
    seed: int
    use_compile: bool
    _built: dict[str, tuple[nn.Module, Facts]] = field(default_factory=dict)

    def baseline(self, x: Tensor) -> Candidate:
        """torch's own product in bfloat16."""

        def build() -> tuple[Work, Facts]:
            model = self._plain()
            weight, bias = model.linear.weight, model.linear.bias
            return lambda: F.linear(x, weight, bias), {"library": "torch", "weight_bytes": work.held_bytes(model)}

        return Candidate(BASELINE, "baseline", build)

    def engine(self, mm_type: str, x: Tensor) -> Candidate:
        """The engine's layer of `mm_type`; building it raises ConfigError when it cannot be computed here."""

        def make() -> tuple[nn.Module, Facts]:
            with torch.device("meta"):
                model = OneLinear(self.shape.n, self.shape.k)
            shapes = work.parameter_shapes(model)
            plan = work.plan_layers({"linear": (self.shape.n, self.shape.k)}, mm_type, self.device)["linear"]
            swap_linears(model, {"linear": plan}, work.DTYPE, auto_quant=True)
            work.materialize(model, shapes, torch.device(self.device.torch_name), self.seed)
            if self.use_compile:
                model.compile(fullgraph=True, dynamic=False)
            return model, {"mm_type": mm_type, "library": plan.library, "how": plan.reason}

        return self._candidate(mm_type + (" compiled" if self.use_compile else ""), "lightx2v", make, x)

    def peer(self, choice: Choice, x: Tensor) -> Candidate:
        """The layer as a peer quantizes it."""

        def make() -> tuple[nn.Module, Facts]:
            choice.check("linear")
            model = self._plain()
            choice.quantize(model, ["linear"])
            if choice.compiled:
                model.compile(dynamic=False)
            return model, {"library": choice.peer.modules[0], "how": choice.peer.words}

        return self._candidate(choice.name, "peer", make, x)

    def _plain(self) -> OneLinear:
        with torch.device("meta"):
            model = OneLinear(self.shape.n, self.shape.k)
        work.materialize(model, work.parameter_shapes(model), torch.device(self.device.torch_name), self.seed)
        return model

    def _candidate(self, name: str, kind: Kind, make: Callable[[], tuple[nn.Module, Facts]], x: Tensor) -> Candidate:
        def build() -> tuple[Work, Facts]:
            if name not in self._built:
                self._built[name] = make()
            model, facts = self._built[name]
            return lambda: model(x), {**facts, "weight_bytes": work.held_bytes(model)}

        return Candidate(name, kind, build)


def measured_peak(device: DeviceInfo) -> tuple[float, int]:
    """Operations a second of torch's best bfloat16 product of square matrices here, and the side of those matrices."""
    sides = (1024, 2048) if device.kind == "cpu" else (4096, 8192)
    return max((_product_rate(side, device), side) for side in sides)


def _product_rate(side: int, device: DeviceInfo) -> float:
    a, b = (activations(side, side, device, seed) for seed in (1, 2))
    product = Candidate("product", "baseline", lambda: (lambda: a @ b, {}))
    measured = measure([product], device, Timing(repeats=5, warmup=2, sample_seconds=_SAMPLE_SECONDS))
    return 2 * side**3 / measured.entries[0].best


def run_linear(
    shapes: Sequence[Shape],
    rows: Sequence[int],
    mm_types: Sequence[str],
    peers: Sequence[Choice],
    *,
    device: DeviceInfo,
    seed: int,
    use_compile: bool,
    timing: Timing,
) -> tuple[list[Case], dict[str, float], list[str]]:
    """A case for each shape and number of rows; the peak, as settings and as notes."""
    peak, side = measured_peak(device)
    if use_compile or any(choice.compiled for choice in peers):
        allow_many_compilations()
    cases = []
    for shape in shapes:
        layers = Layers(shape, device, seed, use_compile)
        for count in rows:
            x = activations(count, shape.k, device, seed)
            candidates = [
                layers.baseline(x),
                *(layers.engine(mm_type, x) for mm_type in mm_types),
                *(layers.peer(choice, x) for choice in peers),
            ]
            logger.info("{} x {}, {} rows: {} candidates", shape.n, shape.k, count, len(candidates))
            measured = measure(candidates, device, replace(timing, sample_seconds=_SAMPLE_SECONDS))
            entries = tuple(_with_rates(entry, shape, count, peak) for entry in measured.entries)
            title = f"{shape.n}x{shape.k}, {count} rows" + (f" ({shape.label})" if shape.label else "")
            amount = {"n": shape.n, "k": shape.k, "rows": count, "flops": _flops(shape, count)}
            cases.append(Case(title, amount, replace(measured, entries=entries), COLUMNS))
    notes = [
        f"peak: {peak / 1e12:.3g} TFLOP/s, the best torch.matmul of two {side}x{side} bfloat16 matrices at the start of"
        " this run; 8-bit products may exceed it",
        "GB/s counts bfloat16 activations read, the weight as it is held, and the bfloat16 result written",
        f"error is the distance from the result of {BASELINE} over its length",
    ]
    return cases, {"peak_flops_per_s": peak, "peak_side": side}, notes


def activations(rows: int, k: int, device: DeviceInfo, seed: int) -> Tensor:
    """[rows, K] bfloat16, normal."""
    generator = torch.Generator(device.torch_name).manual_seed(seed)
    return torch.empty(rows, k, dtype=work.DTYPE, device=device.torch_name).normal_(generator=generator)


def _flops(shape: Shape, rows: int) -> int:
    return 2 * rows * shape.n * shape.k


def _with_rates(entry: Entry, shape: Shape, rows: int, peak: float) -> Entry:
    moved = 2 * rows * (shape.k + shape.n) + entry.facts["weight_bytes"]
    rate = _flops(shape, rows) / entry.median
    rates = {"flops_per_s": rate, "bytes_per_s": moved / entry.median, "share_of_peak": rate / peak}
    return replace(entry, facts={**entry.facts, **rates})


COLUMNS = (
    Column("library", lambda entry: str(entry.facts["library"])),
    Column("ms", lambda entry: f"{entry.median * 1e3:.4g}"),
    Column("min ms", lambda entry: f"{entry.best * 1e3:.4g}"),
    fact("TFLOP/s", "flops_per_s", "{:.3f}", 1e-12),
    fact("GB/s", "bytes_per_s", "{:.1f}", 1e-9),
    fact("of peak", "share_of_peak", "{:.0%}"),
    fact("error", "error", "{:.2g}"),
)
