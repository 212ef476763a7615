"""`lightx2v calibrate --output`: observe, smooth, solve and write the quantized weights of a DiT, part by part."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from lightx2v import __version__, foreign
from lightx2v.calibrate.output import Output
from lightx2v.calibrate.report import Report, render
from lightx2v.calibrate.rules import bits_per_weight
from lightx2v.calibrate.solve import (
    Solved,
    check_recipe,
    find_multiplier,
    input_leaves,
    is_smoothed,
    rotation_of,
    solve_layer,
    wants_range,
)
from lightx2v.calibrate.target import Chooser, Chosen, Goal, search_folder
from lightx2v.calibrate.trial import output_error
from lightx2v.calibrate.walk import BlockWalk, Part, PipelineWalk, Walk
from lightx2v.calibrate.watch import Wants, Watch, shared_inputs
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.config.features import CacheConfig
from lightx2v.config.schema import Config, MMConfig
from lightx2v.convert.configs import write_json
from lightx2v.convert.source import fingerprint
from lightx2v.errors import ConfigError
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.mm.select import match_rules, matcher
from lightx2v.plan import Plan
from lightx2v.platform import DeviceInfo, peak_memory, select_device
from lightx2v.quant.around import Around
from lightx2v.quant.spec import INT8_STEPS
from lightx2v.runner import open_plan

_STAGING = ".incomplete"
TARGET = "target.json"
"""What was chosen, and why."""


def unquantized(config: Config, prompt: str) -> Config:
    """The same settings with float weights and every forward computed: what is observed."""
    sampling = config.sampling.model_copy(update={"cfg_schedule": None, "changing_resolution": False})
    changes = {"mm_config": MMConfig(), "dit_quantized_ckpt": None, "cache": CacheConfig(), "compile": False}
    return config.model_copy(update={**changes, "graphs": False, "sampling": sampling, "prompt": prompt})


def schemes_of(config: Config, layers: Iterable[str], sensitive: Sequence[str]) -> dict[str, Scheme]:
    """The scheme that each layer is to have, without those that stay floats. Raises ConfigError.

    Layers that match a glob of `sensitive` keep 8 bits where others have fewer and no rule names them.
    """
    types, unused = match_rules(layers, config.mm_config.mm_type, config.mm_config.rules)
    for rule in unused:
        logger.warning("mm_config.rules: '{}' matches no layer", rule.match)
    recipe = config.calibration
    if recipe.sensitive != "none":
        below = {name for name, mm_type in types.items() if bits_per_weight(parse(mm_type).weight) < 8}
        ruled = {name for rule in config.mm_config.rules for name in types if matcher(rule.match)(name)}
        types |= {
            name: recipe.sensitive for name in below - ruled if any(fnmatchcase(name, glob) for glob in sensitive)
        }
    found = {name: parse(mm_type) for name, mm_type in types.items()}
    return {name: scheme for name, scheme in found.items() if scheme.weight is not None}


@dataclass(frozen=True)
class StepGroups:
    """How the steps of a request fall into groups for scales that change: none before the first, then equal parts."""

    first: tuple[int, ...]
    steps: int

    @staticmethod
    def of(recipe: CalibrationConfig, steps: int) -> StepGroups:
        start = min(round(recipe.dynamic_share * steps), steps - 1)
        parts = min(recipe.step_groups, steps - start)
        return StepGroups(tuple(start + part * (steps - start) // parts for part in range(parts)), steps)

    def key(self, step: int, steps: int) -> int:
        """The group of a step; -1 for one whose scales are found per token."""
        there = step * self.steps // steps
        return sum(first <= there for first in self.first) - 1


def calibrate(config: Config, prompts: Sequence[str], output: Path) -> Report:
    """Make quantized weights in the folder `output`. What an interrupted run has finished is kept.

    Raises ConfigError for a recipe that cannot be followed and CheckpointError for a model that is quantized already.
    """
    begin, recipe = time.perf_counter(), config.calibration
    plan = open_plan(unquantized(config, prompts[0]))
    staging = output / _STAGING
    walk: Walk = BlockWalk(plan, staging / "streams") if isinstance(plan, Plan) else PipelineWalk(plan)
    schemes = schemes_of(config, walk.layers, walk.sensitive)
    if not schemes:
        raise ConfigError("mm_config", "names no quantized layer", do="set mm_config.mm_type to what is to be made")
    check_recipe(recipe, schemes)
    made = Output(output, staging, _identity(config, prompts, plan))
    done = made.resume(walk.names)
    steps = StepGroups.of(recipe, plan.request.steps)
    with tqdm(total=len(walk.names), initial=done, desc="solve", unit="part") as bar:
        if done < len(walk.names):
            walk.prepare(prompts, recipe.forwards)
        for part in walk.parts(done):
            here = {name: scheme for name, scheme in schemes.items() if name.startswith(part.prefix)}
            solved = calibrate_part(part, here, recipe, steps, plan.device)
            made.write(part.name, part.prefix, walk.source, solved, schemes)
            bar.update()
    made.write_rest(walk.prefixes, walk.source)
    walk.finish()
    report = Report(
        output=str(output),
        mm_type=config.mm_config.mm_type,
        prompts=len(prompts),
        layers=made.reports(walk.names),
        seconds=round(time.perf_counter() - begin, 1),
        peak_memory_bytes=peak_memory(select_device("cpu")),
        bytes_out=made.nbytes(),
    )
    made.publish(walk.names, report.to_json())
    return report


def calibrate_part(
    part: Part, schemes: Mapping[str, Scheme], recipe: CalibrationConfig, steps: StepGroups, device: DeviceInfo
) -> dict[str, Solved]:
    """The tensors of the layers of one part, by full name."""
    local = {name.removeprefix(part.prefix): scheme for name, scheme in schemes.items()}
    groups = shared_inputs(part.module, list(local))
    linears: dict[str, Any] = {name: part.module.get_submodule(name) for name in local}
    weights = {name: linear.weight.detach().float() for name, linear in linears.items()}
    ranged = {name for name, members in groups.items() if any(wants_range(local[one].activation) for one in members)}
    stepwise = any(scheme.activation == INT8_STEPS for scheme in local.values())
    seen = Watch(groups, _wants(recipe, bool(ranged)), steps.key if stepwise else lambda step, steps: 0)
    with seen.attached(part.module):
        part.run(seen.at)
    around = {
        name: _around(recipe, f"{part.prefix}{name}", [weights[one] for one in members], local[members[0]], seen, name)
        for name, members in groups.items()
    }
    ranges = seen
    if changed := {name: groups[name] for name in ranged if around[name].before}:
        # Ranges are those of the inputs as they will be quantized.
        ranges = Watch(changed, Wants(bins=4096), seen.key)
        with ranges.attached(part.module, around):
            part.run(ranges.at)
    solved: dict[str, Solved] = {}
    for name, members in groups.items():
        total = seen.total(name)
        for one in members:
            scheme = local[one]
            found = solve_layer(recipe, scheme, weights[one], total, around[name])
            leaves = dict(found.leaves)
            if scheme.activation is not None and wants_range(scheme.activation):
                by_steps = (ranges if name in changed else seen).found[name]
                leaves |= input_leaves(
                    recipe, scheme.activation, _static(by_steps, steps, scheme), list(steps.first), steps.steps
                )
            assert total.sample is not None
            error = output_error(scheme, leaves, weights[one], total.sample.rows, device)
            solved[f"{part.prefix}{one}"] = Solved(leaves, {**found.told, "error": error})
    return solved


def _static(by_steps: Mapping[int, Any], steps: StepGroups, scheme: Scheme) -> Mapping[int, Any]:
    """Statistics of the groups of steps that have scales of their own; of all steps where there is but one."""
    if scheme.activation == INT8_STEPS:
        # A group that no forward fell into takes the nearest that has seen some.
        known = sorted(by_steps)
        return {group: by_steps[min(known, key=lambda one: abs(one - group))] for group in range(len(steps.first))}
    merged = None
    for one in by_steps.values():
        if merged is None:
            merged = type(one).from_state(one.state())
        else:
            merged.merge(one)
    return {0: merged}


def _wants(recipe: CalibrationConfig, ranged: bool) -> Wants:
    return Wants(bins=4096 if ranged else 0, gram=recipe.solver == "gptq", rows=recipe.rows)


def _around(
    recipe: CalibrationConfig, full_name: str, weights: list[Tensor], scheme: Scheme, seen: Watch, name: str
) -> Around:
    rotation = rotation_of(recipe, weights[0].shape[1])
    multiplier = None
    if is_smoothed(recipe, full_name):
        multiplier = find_multiplier(recipe, scheme, weights, seen.total(name), rotation)
    return Around(multiplier, rotation)


def _identity(config: Config, prompts: Sequence[str], plan: Plan | foreign.PipelinePlan) -> str:
    """What two runs share that make the same weights."""
    path = next(iter(plan.components.values())).checkpoint
    told = [
        config.model_dump(mode="json", exclude={"save_result_path", "prompt", "schema_"}),
        list(prompts),
        __version__,
    ]
    text = json.dumps([*told, fingerprint(Checkpoint.open(path))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run(config: Config, prompts: Sequence[str], output: Path, target: str | None, as_json: bool) -> None:
    """Choose mm_types where there is a target, calibrate, and print what came of it."""
    with torch.inference_mode():
        chosen = None if target is None else choose(config, prompts, output, Goal.parse(target))
        report = calibrate(config if chosen is None else chosen.config(config), prompts, output)
    told = report.to_json() if chosen is None else {**report.to_json(), "target": chosen.to_json()}
    if chosen is not None:
        write_json(output / TARGET, chosen.to_json())
    print(json.dumps(told, indent=2) if as_json else render(report, None if chosen is None else chosen.to_json()))


def choose(config: Config, prompts: Sequence[str], output: Path, goal: Goal) -> Chosen:
    """The mm_type of every layer for a goal. Raises ConfigError where it cannot be met."""
    plan = open_plan(unquantized(config, prompts[0]))
    if not isinstance(plan, Plan):
        raise ConfigError(
            "--target", f"needs the blocks of a model of this engine, and model_cls is {config.model_cls}"
        )
    walk = BlockWalk(plan, search_folder(output))
    try:
        walk.prepare(prompts, config.calibration.forwards)
        chooser = Chooser(config, walk, prompts, plan.device)
        return chooser.choose(goal, chooser.sensitivity())
    finally:
        walk.finish()
