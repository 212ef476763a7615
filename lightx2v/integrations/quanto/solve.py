"""Codes of 4 and 2 bits chosen with the inputs of each layer in view, as a start for training or instead of it.

Layer after layer: the weight that makes of the quantized model's inputs what the original layer made of its own (linear
least squares, as in GPTAQ, arXiv 2504.02692), GPTQ's codes for it, and coordinate descent from those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightx2v.errors import ConfigError
from lightx2v.integrations.quanto.modules import QuantizedLinear
from lightx2v.quant.calibration.descent import descend
from lightx2v.quant.calibration.gptq import gptq
from lightx2v.quant.calibration.grids import IntegerGrid, dequantize
from lightx2v.quant.calibration.solved import grid_of

Run = Callable[[nn.Module], object]
"""Feeds the inputs to calibrate with through a module, always the same in the same order."""


@torch.no_grad()
def solve(model: nn.Module, original: nn.Module, run: Run, *, damp: float = 3e-4) -> None:
    """Choose codes and ranges of the linears of 4 and 2 bits in `model`, which `quantize` made of a copy of `original`.

    `run` is called with either of them for each input that linears share. Weights become the values of their codes,
    ranges learned ones (`learn_ranges`), and biases take up the mean error, so that training can go on from there.
    `damp` times the mean diagonal is added to the second moments of the inputs. Both modules may be a part of a model;
    layers that `run` does not reach stay as they are.
    Raises ConfigError where there is nothing to solve, or where `run` gives the two of them different inputs.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear) and layer.has_ranges and not layer.frozen
    }
    if not layers:
        raise ConfigError("solve", "no linear of 4 or 2 bits that is not frozen", do="call quantize first")
    for layer in layers.values():
        layer.rounds = False
    try:
        for names in _in_order(original, layers, run):
            moments = _moments(model, original, names[0], run)
            for name in names:
                _solve_layer(layers[name], original.get_submodule(name), moments, damp)
                layers[name].rounds = True
    finally:
        for layer in layers.values():
            layer.rounds = True


@dataclass(slots=True)
class _Moments:
    """Of the inputs x of a quantized layer and t of the original: their number, sums [K], x^T x and t^T x [K, K]."""

    count: int
    sum_x: Tensor
    sum_t: Tensor
    gram: Tensor
    cross: Tensor

    def means(self, centred: bool) -> tuple[Tensor, Tensor]:
        """The mean x^T x and t^T x; `centred`: of what is left without the mean inputs, which a bias takes up."""
        gram, cross = self.gram / self.count, self.cross / self.count
        if not centred:
            return gram, cross
        mean_x, mean_t = self.sum_x / self.count, self.sum_t / self.count
        return gram - mean_x.outer(mean_x), cross - mean_t.outer(mean_x)


@dataclass(slots=True)
class _Calls:
    """Which layers were called, those of the same input together."""

    names: list[list[str]] = field(default_factory=list)
    last: Tensor | None = None

    def see(self, name: str, x: Tensor) -> None:
        if any(name in group for group in self.names):
            return
        if x is self.last:
            self.names[-1].append(name)
        else:
            self.names.append([name])
        self.last = x


def _in_order(original: nn.Module, layers: Iterable[str], run: Run) -> list[list[str]]:
    calls = _Calls()
    with _watching({name: original.get_submodule(name) for name in layers}, calls.see):
        run(original)
    return calls.names


@contextmanager
def _watching(layers: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(model: nn.Module, original: nn.Module, name: str, run: Run) -> _Moments:
    wanted: list[Tensor] = []
    with _watching({name: original.get_submodule(name)}, lambda _, t: wanted.append(t.detach().clone())):
        run(original)
    k = wanted[0].shape[-1]
    device = wanted[0].device
    sums, squares = torch.zeros(2, k, device=device), torch.zeros(2, k, k, device=device)
    found = _Moments(0, *sums, *squares)
    left = iter(wanted)

    def see(_: str, x: Tensor) -> None:
        t = next(left, None)
        if t is None or t.shape != x.shape:
            raise ConfigError("solve", f"'{name}' has other inputs than in the original", do="give run the same inputs")
        rows, targets = x.detach().flatten(0, -2).float(), t.flatten(0, -2).float()
        found.count += len(rows)
        found.sum_x += rows.sum(dim=0)
        found.sum_t += targets.sum(dim=0)
        found.gram.addmm_(rows.T, rows)
        found.cross.addmm_(targets.T, rows)

    with _watching({name: model.get_submodule(name)}, see):
        run(model)
    return found


def _solve_layer(layer: QuantizedLinear, original: nn.Module, moments: _Moments, damp: float) -> None:
    assert layer.spec is not None
    assert isinstance(original, nn.Linear)
    weight, bias = original.weight.float(), layer.bias
    gram, cross = moments.means(centred=bias is not None)
    added = damp * gram.diagonal().mean()
    gram = gram + added * torch.eye(len(gram), device=gram.device)
    best = torch.linalg.solve(gram, (weight @ cross + added * weight).T).T
    grid = grid_of(layer.spec, best, shrink=True)
    assert isinstance(grid, IntegerGrid)
    groups = descend(best, gram, gptq(best, gram, grid, damp=1e-6, act_order=True), grid)
    assert groups.zero is not None
    values = dequantize(groups, grid)
    layer.learn_ranges((groups.scale, -groups.zero * groups.scale))
    layer.weight.copy_(values)
    if bias is not None:
        bias.add_(weight @ moments.sum_t / moments.count - values @ moments.sum_x / moments.count)
