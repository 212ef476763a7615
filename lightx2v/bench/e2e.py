"""`lightx2v bench e2e`: the stages of whole runs, by the pipeline's own timer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from loguru import logger

from lightx2v.bench.measure import Candidate, Facts, Staged, Timing, Work, allow_many_compilations, measure
from lightx2v.bench.peers.base import Choice
from lightx2v.bench.report import Case, Column, fact
from lightx2v.bench.work import held_bytes
from lightx2v.config.schema import Config, MMConfig
from lightx2v.errors import ConfigError
from lightx2v.mm.scheme import parse
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.plan import resolve
from lightx2v.platform import select_device
from lightx2v.runner import Runner
from lightx2v.timing import StageTimer
from lightx2v.units import human_bytes

ENCODE, DENOISE, DECODE = "encode text", "denoise", "decode"


def with_type(config: Config, mm_type: str) -> Config:
    """`config` with the DiT's float weights quantized to `mm_type` as they load."""
    auto = parse(mm_type).weight is not None
    return config.model_copy(
        update={"mm_config": MMConfig(mm_type=mm_type, weight_auto_quant=auto), "dit_quantized_ckpt": None}
    )


def stage_seconds(timer: StageTimer) -> dict[str, float]:
    """Seconds by stage; loading counts as one stage."""
    found: dict[str, float] = {}
    for stage in timer.stages:
        name = "load" if stage.name.startswith("load ") else stage.name
        found[name] = found.get(name, 0.0) + stage.seconds
    return found


def engine(name: str, config: Config) -> Candidate:
    """The engine's pipeline of `config`; building it raises ConfigError when it does not resolve."""

    def build() -> tuple[Work, Facts]:
        pipe = LightX2VPipeline.from_config(config)
        if not isinstance(pipe.runner, Runner):
            raise ConfigError("model_cls", f"is {config.model_cls}", do="measure a model of this engine")

        def run() -> Staged:
            frames = pipe.generate(quiet=True)
            return Staged(stage_seconds(pipe.timer), torch.from_numpy(frames))

        part = pipe.plan.components["dit"]
        with pipe.runner.components.use("dit", StageTimer(pipe.plan.device)) as loaded:
            held = held_bytes(loaded.model)
        facts = {
            "mm_type": config.mm_config.mm_type,
            "library": ", ".join(sorted({layer.library for layer in part.layers})),
            "attention": pipe.plan.attention_name,
            "weight_bytes": held,
            "steps": pipe.plan.request.steps,
            "plan": pipe.plan.hash,
        }
        return run, facts

    return Candidate(name, "lightx2v", build)


def peer(choice: Choice, config: Config) -> Candidate:
    """diffusers' pipeline around the same text encoder and VAE, with its own transformer of the same weights."""

    def build() -> tuple[Work, Facts]:
        choice.check("e2e")
        from lightx2v.bench.peers.pipeline import build_run

        plan = resolve(with_type(config, "Default"), select_device(config.device))
        run, held = build_run(plan, choice)
        facts = {
            "library": choice.peer.modules[0],
            "how": choice.peer.words,
            "weight_bytes": held,
            "steps": plan.request.steps,
        }
        return run, facts

    return Candidate(choice.name, "peer", build)


def run_e2e(
    config: Config, mm_types: Sequence[str], peers: Sequence[Choice], *, timing: Timing
) -> tuple[Case, list[str]]:
    """The case, and notes. Without `mm_types`, the engine runs as `config` says."""
    configs = {name: with_type(config, name) for name in mm_types} or {config.mm_config.mm_type: config}
    device = select_device(config.device)
    request = resolve(next(iter(configs.values())), device).request
    if any(choice.compiled for choice in peers):
        allow_many_compilations()
    candidates = [engine(name, each) for name, each in configs.items()] + [peer(choice, config) for choice in peers]
    logger.info("{} candidates", len(candidates))
    measured = measure(candidates, device, timing)
    entries = tuple(
        replace(entry, facts={**entry.facts, "stage_medians": _medians(entry.stages)}) for entry in measured.entries
    )
    size = f"{request.width}x{request.height}, {request.frames} frames, {request.steps} steps"
    title = f"{'tiny-wan' if config.model_path is None else 'checkpoint'}, {request.task}, {size}"
    amount = {
        "task": request.task,
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "steps": request.steps,
        "guidance": request.guidance if request.cfg else None,
        "solver": request.solver,
    }
    notes = [
        f"{request.steps} steps, {'two forward passes' if request.cfg else 'one forward pass'} each; loading is not"
        " counted, but where the configuration unloads what it has used",
        "error is the distance of the frames from those of the first row over their length",
    ]
    names = list(dict.fromkeys(name for entry in entries for name in entry.stages))
    columns = [
        Column("library", lambda entry: str(entry.facts["library"])),
        *(_stage(name) for name in names),
        Column("s/step", lambda entry: f"{_median(entry.facts, DENOISE) / entry.facts['steps']:.4g}"),
        Column("total", lambda entry: f"{entry.median:.4g}"),
        Column("min total", lambda entry: f"{entry.best:.4g}"),
        Column("DiT weights", lambda entry: human_bytes(entry.facts["weight_bytes"])),
        fact("error", "error", "{:.2g}"),
    ]
    return Case(title, amount, replace(measured, entries=entries), tuple(columns)), notes


def _medians(stages: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in stages.items()}


def _median(facts: Facts, stage: str) -> float:
    return float(facts["stage_medians"].get(stage, 0.0))


def _stage(name: str) -> Column:
    return Column(name, lambda entry: f"{_median(entry.facts, name):.4g}")
