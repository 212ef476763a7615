"""`lightx2v calibrate --output`: observe, smooth, solve and write the quantized weights of a DiT, part by part."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from tqdm import tqdm

from lightx2v import __version__, foreign
from lightx2v.calibrate.output import Output
from lightx2v.calibrate.part import PartSolver
from lightx2v.calibrate.report import Report, render, together
from lightx2v.calibrate.rules import bits_per_weight
from lightx2v.calibrate.solve import check_recipe
from lightx2v.calibrate.steps import StepGroups
from lightx2v.calibrate.target import Chooser, Chosen, Goal
from lightx2v.calibrate.walk import BlockWalk, PipelineWalk, Walk
from lightx2v.config.features import AttentionConfig, CacheConfig
from lightx2v.config.schema import Config, MMConfig
from lightx2v.convert.configs import write_json
from lightx2v.convert.source import fingerprint
from lightx2v.errors import ConfigError
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.mm.select import match_rules, matcher
from lightx2v.plan import Plan
from lightx2v.plan.layers import ComponentPlan
from lightx2v.platform import peak_memory, select_device
from lightx2v.runner import open_plan

_STAGING, _SEARCH = ".incomplete", ".incomplete-search"
TARGET = "target.json"
"""What was chosen, and why."""


def unquantized(config: Config, prompt: str) -> Config:
    """The same settings with float weights, exact attention and every forward computed: what is observed."""
    sampling = config.sampling.model_copy(update={"cfg_schedule": None, "changing_resolution": False})
    changes: dict[str, Any] = {"mm_config": MMConfig(), "dit_quantized_ckpt": None, "attention": AttentionConfig()}
    changes |= {"cache": CacheConfig(), "compile": False, "graphs": False, "sampling": sampling, "prompt": prompt}
    return config.model_copy(update=changes)


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


def calibrate(config: Config, prompts: Sequence[str], output: Path) -> Report:
    """Make quantized weights in the folder `output`. What an interrupted run has finished is kept.

    Those of a pipeline with several transformers, experts for parts of the steps, go into a folder of `output` each.
    Raises ConfigError for a recipe that cannot be followed and CheckpointError for a model that is quantized already.
    """
    plan = open_plan(unquantized(config, prompts[0]))
    if isinstance(plan, Plan):
        walk = BlockWalk(plan, output / _STAGING / "streams")
        return _calibrate(config, prompts, plan, walk, plan.components["dit"], output)
    experts = [part.name for part in plan.files.denoisers]
    folders = [output] if len(experts) == 1 else [output / name for name in experts]
    reports = [
        _calibrate(config, prompts, plan, PipelineWalk(plan, name), plan.components[name], folder)
        for name, folder in zip(experts, folders, strict=True)
    ]
    return reports[0] if len(reports) == 1 else together(dict(zip(experts, reports, strict=True)), str(output))


def _calibrate(
    config: Config,
    prompts: Sequence[str],
    plan: Plan | foreign.PipelinePlan,
    walk: Walk,
    component: ComponentPlan,
    output: Path,
) -> Report:
    """One model."""
    begin, recipe = time.perf_counter(), config.calibration
    schemes = schemes_of(config, walk.layers, walk.sensitive)
    if not schemes:
        raise ConfigError("mm_config", "names no quantized layer", do="set mm_config.mm_type to what is to be made")
    check_recipe(recipe, schemes)
    made = Output(output, output / _STAGING, _identity(config, prompts, component))
    done = made.resume(walk.names)
    steps = StepGroups.of(recipe, plan.request.steps)
    with tqdm(total=len(walk.names), initial=done, desc="solve", unit="part") as bar:
        if done < len(walk.names):
            walk.prepare(prompts, recipe.forwards)
        for part in walk.parts(done):
            here = {name: scheme for name, scheme in schemes.items() if name.startswith(part.prefix)}
            solved = PartSolver(part, here, recipe, steps, plan.device).solve()
            made.write(part.name, part.prefix, walk.source, solved, schemes)
            bar.update()
    made.write_rest(walk.prefixes, walk.source)
    walk.finish()
    report = _report(made, walk, config.mm_config.mm_type, len(prompts), begin)
    made.publish(walk.names, report.to_json())
    return report


def _report(made: Output, walk: Walk, mm_type: str, prompts: int, begin: float) -> Report:
    return Report(
        output=str(made.folder),
        mm_type=mm_type,
        prompts=prompts,
        layers=made.reports(walk.names),
        seconds=round(time.perf_counter() - begin, 1),
        peak_memory_bytes=peak_memory(select_device("cpu")),
        bytes_out=made.nbytes(),
    )


def _identity(config: Config, prompts: Sequence[str], component: ComponentPlan) -> str:
    """What two runs share that make the same weights."""
    told = [
        config.model_dump(mode="json", exclude={"save_result_path", "prompt", "schema_"}),
        list(prompts),
        __version__,
    ]
    text = json.dumps([*told, fingerprint(Checkpoint.open(component.checkpoint))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run(config: Config, prompts: Sequence[str], output: Path, target: str | None, as_json: bool) -> None:
    """Calibrate, for a goal where there is a target, and print what came of it."""
    chosen = None
    with torch.inference_mode():
        if target is None:
            report = calibrate(config, prompts, output)
        else:
            chosen, report = calibrate_for(config, prompts, output, Goal.parse(target))
    if chosen is None:
        print(json.dumps(report.to_json(), indent=2) if as_json else render(report))
    else:
        told = {**report.to_json(), "target": chosen.to_json()}
        print(json.dumps(told, indent=2) if as_json else render(report, chosen.to_json()))


def calibrate_for(config: Config, prompts: Sequence[str], output: Path, goal: Goal) -> tuple[Chosen, Report]:
    """Choose the mm_type of every layer for a goal, and write the weights that the choice was measured with.

    `mm_config` and `calibration.sensitive` are not looked at. Raises ConfigError where the goal cannot be met.
    """
    begin, folder = time.perf_counter(), output / _SEARCH
    plan = open_plan(unquantized(config, prompts[0]))
    if not isinstance(plan, Plan):
        raise ConfigError(
            "--target", f"needs the blocks of a model of this engine, and model_cls is {config.model_cls}"
        )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        walk = BlockWalk(plan, folder / "streams")
        chooser = Chooser(config, walk, prompts, plan.device, folder)
        walk.prepare(prompts, config.calibration.forwards)
        chosen = chooser.choose(goal, chooser.sensitivity())
        made = Output(output, output / _STAGING, "")
        chooser.write(chosen, made)
        report = _report(made, walk, chosen.mm_type, len(prompts), begin)
        made.publish(walk.names, report.to_json())
        write_json(output / TARGET, chosen.to_json())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return chosen, report
