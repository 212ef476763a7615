"""How much each quantized linear of a DiT adds to the error by itself, on the tokens that the reference run gives it.

The reference runs; beside each of its linears that the tested configuration computes in another way, that layer of the
tested model gets the same input. Only sums of squares are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightx2v.components import load_dit
from lightx2v.config.features import OffloadConfig
from lightx2v.config.schema import Config
from lightx2v.denoising import denoise_request
from lightx2v.errors import ConfigError
from lightx2v.eval.layer_report import LayerError, LayerErrors
from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.mm.static import StepScales
from lightx2v.models.base import Branch
from lightx2v.plan import Plan
from lightx2v.request import Request
from lightx2v.runner import Runner, open_plan

STEPS = 6
"""Steps of a request that are looked at, when nobody says how many."""


@dataclass
class _Sums:
    """Squares of the error and of the output, by step."""

    error: dict[int, float] = field(default_factory=dict)
    output: dict[int, float] = field(default_factory=dict)

    def add(self, step: int, wanted: Tensor, got: Tensor) -> None:
        exact = wanted.float()
        self.error[step] = self.error.get(step, 0.0) + float((got.float() - exact).square().sum())
        self.output[step] = self.output.get(step, 0.0) + float(exact.square().sum())

    def relative(self, step: int | None = None) -> float:
        steps = self.error if step is None else (step,)
        error, output = (sum(sums[step] for step in steps) for sums in (self.error, self.output))
        return (error / output) ** 0.5 if output else 0.0


class _Watch:
    """Which step runs, as a feature of the reference's requests, in the place of a cache.

    Layers of the tested `models` that have other scales from step to step are told of it.
    """

    def __init__(self, count: int, models: Sequence[nn.Module]) -> None:
        self.count, self.models = count, models
        self.steps: frozenset[int] = frozenset()
        self.step = -1

    @property
    def looks(self) -> bool:
        return self.step in self.steps

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        self.steps = frozenset(spaced(run.steps, self.count))
        return inner

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        scales = [StepScales(model, run.steps) for model in self.models]

        def forward(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
            self.step = step
            for of_model in scales:
                of_model.at(step)
            return predict(latents, timestep, step, branch)

        return forward

    def schedule(self, run: RunInfo) -> Schedule | None:
        return None


class _Watched(nn.Module):
    """A linear of the reference in whose place the tested ones are computed too. The model sees the reference's."""

    def __init__(self, base: nn.Module, tested: Sequence[nn.Module], watch: _Watch) -> None:
        super().__init__()
        self.base = base
        self._tested, self._watch = tuple(tested), watch
        self.sums = [_Sums() for _ in tested]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self._watch.looks:
            for layer, sums in zip(self._tested, self.sums, strict=True):
                sums.add(self._watch.step, y, layer(x))
        return y


def spaced(steps: int, count: int) -> tuple[int, ...]:
    """Up to `count` of `steps` steps, evenly, the first and the last among them."""
    if count < 2:
        return (0,)
    return tuple(sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)}))


def in_memory(config: Config) -> Config:
    """The same settings with every layer a module in memory, which can be called alone."""
    return config.model_copy(update={"compile": False, "graphs": False, "offload": OffloadConfig()})


@torch.inference_mode()
def layer_errors(
    reference: Config, tested: Sequence[Config], requests: Sequence[Request], steps: int = STEPS
) -> list[LayerErrors]:
    """Run `requests` once by `reference`, and hold every linear against that of each of `tested`.

    Looks at so many `steps` of each request, and holds the DiT of every configuration in memory at once. A layer is
    listed where its plan is another, or the weights are another file's. Raises ConfigError for `model_cls: diffusers`
    and for other DiTs.
    """
    plans = [_native(in_memory(config)) for config in (reference, *tested)]
    runner = Runner(plans[0], fuse=False)
    conditions = [runner.encode(request) for request in requests]
    models = [load_dit(plan, fuse=False).model for plan in plans[1:]]
    with runner.components.use("dit", runner.timer) as loaded:
        named = [changed_layers(plans[0], plan) for plan in plans[1:]]
        others = [_other_parameters(loaded.model, model, names) for model, names in zip(models, named, strict=True)]
        watch = _Watch(steps, models)
        watched = {
            name: _put(loaded.model, name, [model.get_submodule(name) for model in models], watch)
            for name in dict.fromkeys(name for names in named for name in names)
        }
        for request, (made, image) in zip(requests, conditions, strict=True):
            denoise_request(plans[0], loaded, request, made, image, feature=watch, quiet=True)
    return [
        LayerErrors(
            tuple(_found(plans[0], plan, {name: watched[name].sums[index] for name in names})),
            tuple(sorted(watch.steps)),
            len(requests),
            tuple(differing),
        )
        for index, (plan, names, differing) in enumerate(zip(plans[1:], named, others, strict=True))
    ]


def _native(config: Config) -> Plan:
    plan = open_plan(config)
    if not isinstance(plan, Plan):
        raise ConfigError("model_cls", "the layers of a pipeline of diffusers cannot be compared one by one")
    return plan


def changed_layers(reference: Plan, tested: Plan) -> list[str]:
    """The linears of the DiT that the two compute in different ways."""
    mine, other = tested.components["dit"], reference.components["dit"]
    plans, others = mine.by_name(), other.by_name()
    if plans.keys() != others.keys():
        raise ConfigError("model_path", "the two configurations have DiTs with other layers")
    moved = mine.checkpoint != other.checkpoint

    def same(name: str) -> bool:
        how, theirs = ((plan.mm_type, plan.scheme, plan.library) for plan in (plans[name], others[name]))
        return how == theirs and (how[0] == "Default" or not moved)

    return [name for name in plans if not same(name)]


def _put(model: nn.Module, name: str, tested: Sequence[nn.Module], watch: _Watch) -> _Watched:
    parent, _, leaf = name.rpartition(".")
    made = _Watched(model.get_submodule(name), tested, watch)
    setattr(model.get_submodule(parent), leaf, made)
    return made


def _other_parameters(reference: nn.Module, tested: nn.Module, layers: Sequence[str]) -> list[str]:
    """Parameters outside of `layers` whose values differ, and which are there in both."""
    inside = tuple(f"{name}." for name in layers)
    mine = dict(tested.named_parameters())
    return [
        name
        for name, parameter in reference.named_parameters()
        if not name.startswith(inside)
        and not parameter.is_meta
        and name in mine
        and not mine[name].is_meta
        and not torch.equal(parameter, mine[name])
    ]


def _found(reference: Plan, tested: Plan, sums: Mapping[str, _Sums]) -> list[LayerError]:
    part, others = tested.components["dit"], reference.components["dit"].by_name()
    plans = part.by_name()
    layers = [
        LayerError(
            name,
            plans[name].mm_type,
            others[name].mm_type,
            plans[name].out_features,
            plans[name].in_features,
            part.layer_bytes.get(name),
            found.relative(),
            {step: found.relative(step) for step in sorted(found.error)},
        )
        for name, found in sums.items()
    ]
    return sorted(layers, key=lambda layer: -layer.error)
