"""One part of a model: its inputs observed, its layers solved, its norms given the multipliers that they can take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightx2v.calibrate.attention import AttentionObserver
from lightx2v.calibrate.smooth import find_multiplier, is_smoothed
from lightx2v.calibrate.solve import Solved, input_leaves, rotation_of, solve_layer, wants_range
from lightx2v.calibrate.steps import StepGroups
from lightx2v.calibrate.trial import output_error
from lightx2v.calibrate.walk import Part, unheard
from lightx2v.calibrate.watch import Wants, Watch, shared_inputs
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.errors import ConfigError
from lightx2v.mm.scheme import Scheme
from lightx2v.models.fold import Foldable, conditioned, fold_multiplier, foldable
from lightx2v.platform import DeviceInfo
from lightx2v.quant.around import Around
from lightx2v.quant.calibration.observers import InputStatistics
from lightx2v.quant.spec import INT8_STEPS

_BINS = 4096


@dataclass(frozen=True)
class PartResult:
    """What is to be written of one part, by full name."""

    solved: Mapping[str, Solved]
    edited: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors in place of the model's own, and new ones."""
    folded: frozenset[str] = frozenset()
    """Layers that a multiplier went out of or into."""


def look(
    part: Part,
    groups: Mapping[str, tuple[str, ...]],
    schemes: Iterable[Scheme],
    recipe: CalibrationConfig,
    steps: StepGroups,
) -> Watch:
    """Run a part once, and keep of the inputs of its `groups` of layers what solving them for `schemes` takes."""
    activations = [scheme.activation for scheme in schemes]
    bins = _BINS if any(map(wants_range, activations)) else 0
    key = steps.key if INT8_STEPS in activations else lambda step, steps: 0
    seen = Watch(groups, Wants(bins, recipe.solver == "gptq", recipe.rows), key)
    with seen.attached(part.module):
        part.run(seen.at)
    return seen


class PartSolver:
    """Solves the layers of `part` that `schemes` has, by full name; `seen` is what an earlier `look` at them gave."""

    def __init__(
        self,
        part: Part,
        schemes: Mapping[str, Scheme],
        recipe: CalibrationConfig,
        steps: StepGroups,
        device: DeviceInfo,
        seen: Watch | None = None,
    ) -> None:
        self.part, self.recipe, self.steps, self.device, self.seen = part, recipe, steps, device, seen
        self.schemes = {name.removeprefix(part.prefix): scheme for name, scheme in schemes.items()}
        self.groups = shared_inputs(part.module, list(self.schemes))
        linears: dict[str, Any] = {name: part.module.get_submodule(name) for name in self.schemes}
        self.weights = {name: linear.weight.detach().float() for name, linear in linears.items()}
        self.edited: dict[str, Tensor] = {}
        self.folds: dict[str, Foldable] = {}
        """By group, where its multiplier goes into what makes the input."""
        self.multipliers: dict[str, Tensor] = {}
        """Of those groups."""

    def solve(self) -> PartResult:
        """Run the part as often as it takes."""
        wanted = {name for name, members in self.groups.items() if any(self._ranged(one) for one in members)}
        seen = self.seen or look(self.part, self.groups, self.schemes.values(), self.recipe, self.steps)
        totals = {name: seen.total(name) for name in self.groups}
        around = {name: self._around(name, totals[name]) for name in self.groups}
        changed = {name: self.groups[name] for name in self.groups if name in wanted and around[name].before}
        ranges = Watch(changed, Wants(_BINS), seen.key)
        if changed:  # ranges are those of the inputs as they will be quantized
            with ranges.attached(self.part.module, around):
                self.part.run(ranges.at)
        for name in self.folds:
            self._fold(name, around[name])
        solved = {
            self.part.prefix + one: self._layer(
                one, around[name], totals[name], (ranges if name in changed else seen).found[name], name in self.folds
            )
            for name, members in self.groups.items()
            for one in members
        }
        if self.recipe.attention:
            self.edited |= self._attention()
        folded = frozenset(layer for record in self.folds.values() for layer in record.layers)
        return PartResult(solved, self.edited, folded)

    def _ranged(self, name: str) -> bool:
        return wants_range(self.schemes[name].activation)

    def _around(self, name: str, seen: InputStatistics) -> Around:
        """What changes the input of a group, and where its multiplier goes."""
        members = self.groups[name]
        weights = [self.weights[one] for one in members]
        rotation, full = rotation_of(self.recipe, weights[0].shape[1]), self.part.prefix + name
        if not is_smoothed(self.recipe, full):
            return Around(None, rotation)
        multiplier = find_multiplier(self.recipe, self.schemes[name], weights, seen, rotation)
        tensors = [self.part.prefix + tensor for tensor, _ in self.part.module.named_parameters()]
        record = foldable(self.part.foldable, full, tensors) if self.recipe.fold and multiplier is not None else None
        # All that reads the input must be divided by what it is multiplied with.
        if record is not None and set(record.consumers) == {self.part.prefix + one for one in members}:
            assert multiplier is not None
            multiplier, self.folds[name] = conditioned(record, multiplier), record
            self.multipliers[name] = multiplier
        return Around(multiplier, rotation)

    def _fold(self, name: str, around: Around) -> None:
        """Put a group's multiplier into the float tensors before it, and into weights that are still to be solved."""
        assert around.multiplier is not None
        record, prefix = self.folds[name], self.part.prefix
        tensors: dict[str, Tensor] = {}
        for producer in record.producers:
            local = producer.removeprefix(prefix)
            for leaf, parameter in self.part.module.get_submodule(local).named_parameters():
                full = f"{producer}.{leaf}"
                tensors[full] = self.edited.get(full, parameter.detach())
            if local in self.weights:
                tensors[f"{producer}.weight"] = self.weights[local]
        fold_multiplier(tensors, record, around.multiplier)
        for producer in record.producers:
            if (local := producer.removeprefix(prefix)) in self.weights:
                self.weights[local] = tensors.pop(f"{producer}.weight")
        self.edited |= tensors

    def _layer(
        self, name: str, around: Around, seen: InputStatistics, by_steps: Mapping[int, InputStatistics], folded: bool
    ) -> Solved:
        scheme, weight = self.schemes[name], self.weights[name]
        found = solve_layer(self.recipe, scheme, weight, seen, around, folded)
        leaves = dict(found.leaves)
        if scheme.activation is not None and wants_range(scheme.activation):
            groups = _static(by_steps, self.steps, scheme)
            leaves |= input_leaves(self.recipe, scheme.activation, groups, list(self.steps.first), self.steps.steps)
        assert seen.sample is not None
        rows = seen.sample.rows.float()
        if folded:
            assert around.multiplier is not None
            rows, weight = rows * around.multiplier, weight / around.multiplier
        error = output_error(scheme, leaves, weight, rows, self.device)
        return Solved(leaves, {**found.told, "error": error, **({"folded": 1} if folded else {})})

    def _attention(self) -> dict[str, Tensor]:
        """Scales of the queries, keys and values of the part, as they are after folding."""
        if self.part.model is None:
            raise ConfigError(
                "calibration.attention", "is true, and the model is none of this engine's", do="set it to false"
            )
        self._edit_module()
        observer = AttentionObserver(rotated=True, smoothed=True)
        with observer.watching(self.part.model, (f"{self.part.prefix}*",)):
            self.part.run(unheard)
        return observer.scales()

    def _edit_module(self) -> None:
        """Give the float part the multipliers that were folded, so that it still computes the same."""
        for full, tensor in self.edited.items():
            self._set(full.removeprefix(self.part.prefix), tensor)
        for name, record in self.folds.items():
            for producer in record.producers:
                if (local := producer.removeprefix(self.part.prefix)) in self.weights:
                    self._set(f"{local}.weight", self.weights[local])
            for consumer in self.groups[name]:
                self._set(f"{consumer}.weight", self.weights[consumer] / self.multipliers[name])

    def _set(self, name: str, tensor: Tensor) -> None:
        parameter = self.part.module.get_parameter(name)
        parameter.data = tensor.to(parameter.dtype)


def _static(
    by_steps: Mapping[int, InputStatistics], steps: StepGroups, scheme: Scheme
) -> Mapping[int, InputStatistics]:
    """Statistics of the groups of steps that have scales of their own; of all steps where there is but one."""
    if scheme.activation == INT8_STEPS:
        # A group that no forward fell into takes the nearest that has seen some.
        return {
            group: by_steps[min(sorted(by_steps), key=lambda one: abs(one - group))]
            for group in range(len(steps.first))
        }
    first, *others = by_steps.values()
    merged = InputStatistics.from_state(first.state())
    for other in others:
        merged.merge(other)
    return {0: merged}
