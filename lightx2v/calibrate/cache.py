"""`lightx2v calibrate --cache`: TeaCache's polynomials and MagCache's ratios of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from loguru import logger
from tqdm import tqdm

from lightx2v.calibrate.fit import Fit, check_steps, fit_signal, mean_ratios
from lightx2v.calibrate.recorder import Recorder
from lightx2v.config.features import CacheConfig
from lightx2v.config.schema import Config
from lightx2v.features.cache import Calibration
from lightx2v.plan import Plan, resolve
from lightx2v.platform import select_device

SHARES = (0.75, 0.5, 0.33)
"""Of the steps that are computed, for which a threshold is told."""


def in_full(config: Config, prompt: str) -> Config:
    """The same settings without what leaves forwards out or makes some of them unlike the others."""
    sampling = config.sampling.model_copy(update={"cfg_schedule": None, "changing_resolution": False})
    return config.model_copy(update={"cache": CacheConfig(), "sampling": sampling, "prompt": prompt})


def calibrate_cache(plan: Plan, prompts: Sequence[str]) -> tuple[Calibration, dict[str, Fit]]:
    """Run the request of `plan` with each prompt and a seed of its own; what was measured, and the fits behind it."""
    from lightx2v.runner import Runner

    check_steps(plan.request.steps)
    runner, recorder = Runner(plan), Recorder()
    for number, prompt in enumerate(tqdm(prompts, desc="calibrate", unit="request")):
        request = replace(plan.request, prompt=prompt, seed=plan.request.seed + number)
        runner.run(request, quiet=True, feature=recorder)
    assert recorder.run is not None
    fits = {name: fit for name in ("head", "blocks") if (fit := fit_signal(recorder.tracks, name)) is not None}
    made = Calibration(
        family=plan.family.name,
        task=plan.request.task,
        width=plan.files.arch.dim,
        blocks=recorder.run.blocks,
        steps=recorder.run.steps,
        prompts=len(prompts),
        head=fits["head"].coefficients,
        blocks_signal=fits["blocks"].coefficients if "blocks" in fits else (),
        ratios=mean_ratios(recorder.tracks),
        plan=plan.hash,
    )
    return made, fits


def run(config: Config, prompts: Sequence[str], save: str, as_json: bool) -> None:
    """Measure, write the file and print what was found."""
    plan = resolve(in_full(config, prompts[0]), select_device(config.device))
    made, fits = calibrate_cache(plan, prompts)
    made.write(save)
    logger.info("saved {}", save)
    if as_json:
        print(json.dumps({**asdict(made), "fits": {name: _fit_json(fit) for name, fit in fits.items()}}, indent=2))
    else:
        print(summary(made, fits))


def _fit_json(fit: Fit) -> dict[str, Any]:
    thresholds = {threshold: fit.computed(threshold) for threshold in map(fit.threshold, SHARES)}
    return {"error": fit.error, "computed_by_threshold": thresholds}


def summary(made: Calibration, fits: dict[str, Fit]) -> str:
    """What was measured, as text."""
    lines = [f"{made.family} {made.task}: {made.prompts} prompts of {made.steps} steps"]
    for name, fit in fits.items():
        numbers = ", ".join(f"{c:.6g}" for c in fit.coefficients)
        ret_steps = str(name == "blocks").lower()
        lines.append(f"teacache, use_ret_steps {ret_steps}: [{numbers}], error {fit.error:.1%} of the changes")
        for share in SHARES:
            threshold = fit.threshold(share)
            lines.append(f"  threshold {threshold:.3g} computes {fit.computed(threshold)} of {made.steps} steps")
    for branch, ratios in made.ratios.items():
        lines.append(f"magcache, {branch}: {min(ratios):.4f} to {max(ratios):.4f}")
    return "\n".join(lines)
