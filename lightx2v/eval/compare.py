"""One configuration held against another: `compare` runs both, and the `Comparison` has all that was found.

from lightx2v.config.load import load_config
from lightx2v.eval.compare import compare
from lightx2v.eval.configs import plain
from lightx2v.eval.prompts import Case, draw_prompts

config = load_config("int8.json")
found = compare(config, plain(config), [Case("a cat on the grass", seed=1)])
found.report.distance_summary()["psnr_mean"], found.layers.layers[0].name, found.to_json()
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightx2v.bench.host import hardware, versions
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.eval.configs import check_comparable, differences, plain, settings
from lightx2v.eval.layer_report import LayerErrors
from lightx2v.eval.layers import STEPS, changed_layers, layer_errors
from lightx2v.eval.metrics import load_lpips
from lightx2v.eval.prompts import Case
from lightx2v.eval.results import Report
from lightx2v.eval.steps import StepErrors, StepRecorder
from lightx2v.eval.suite import Generate, OnClip, run_cases
from lightx2v.plan import Plan
from lightx2v.sampling.loop import Progress

if TYPE_CHECKING:
    from lightx2v.foreign import PipelinePlan
    from lightx2v.pipeline import LightX2VPipeline

DETAILS = 2
"""Cases whose errors are measured by step and by layer, when nobody says how many."""
FPS = 8
ImageOf = Callable[[str, int], str]
"""Prompt and seed to the path of the picture that a clip starts from."""


@dataclass(frozen=True)
class Side:
    """One of the two configurations, and what it came to."""

    config: Config
    plan: Plan | PipelinePlan

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Of the DiT and the encoders, by name."""
        return {name: part.weight_bytes for name, part in self.plan.components.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "mm_type": self.config.mm_config.mm_type,
            "plan": self.plan.hash,
            "config": settings(self.config),
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.plan.memory.peak,
        }


@dataclass(frozen=True)
class Comparison:
    """All that an evaluation found."""

    tested: Side
    reference: Side | None
    report: Report
    steps: StepErrors | None
    layers: LayerErrors | None
    unavailable: Mapping[str, str]
    """What could not be measured ("lpips", "steps", "layers"), and why."""
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """What the two configurations set differently, by dotted key: (tested, reference)."""
        return {} if self.reference is None else differences(self.tested.config, self.reference.config)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, as `lightx2v eval --json` prints it (docs/eval.md)."""
        return {
            **self.report.to_json(),
            "tested": self.tested.to_json(),
            "reference": None if self.reference is None else self.reference.to_json(),
            "differences": {name: list(pair) for name, pair in self.differences.items()},
            "steps": None if self.steps is None else self.steps.to_json(),
            "layers": None if self.layers is None else self.layers.to_json(),
            "unavailable": dict(self.unavailable),
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
        }


def pipeline_of(config: Config) -> LightX2VPipeline:
    """The pipeline of `config`. Raises ConfigError when it does not resolve."""
    from lightx2v.pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config)


def compare(
    config: Config,
    against: Config | None,
    cases: Sequence[Case],
    *,
    details: int = DETAILS,
    layer_steps: int = STEPS,
    on_clip: OnClip | None = None,
) -> Comparison:
    """Make every case by `config` and by `against`, and measure how far they are apart; None: run `config` alone.

    Of the first `details` cases the errors are told by step and by layer too, the latter at `layer_steps` steps (0:
    not), for which both DiTs are in memory once more before the clips are made. `on_clip` is called with each result
    and both clips. Raises ConfigError for configurations that do not resolve or make clips of different sizes.
    """
    pipe = pipeline_of(config)
    other = None if against is None else pipeline_of(against)
    unavailable: dict[str, str] = {}
    layers, lpips, recorder = None, None, StepRecorder(details)
    with ExitStack() as stack:
        image = None
        if config.task == "i2v" and all(case.scene for case in cases):
            image = first_frames(config, Path(stack.enter_context(TemporaryDirectory())))
        if other is not None and against is not None:
            check_comparable(pipe.plan.request, other.plan.request)
            if details and layer_steps:
                try:
                    layers = _layers(pipe, other, cases[:details], layer_steps, image)
                except _Unavailable as reason:
                    unavailable["layers"] = str(reason)
            lpips, needs = load_lpips()
            unavailable |= {"lpips": needs} if needs else {}
        report = run_cases(
            generator(pipe, image, recorder.tested if other is not None and details else None),
            cases,
            None if other is None else generator(other, image, recorder.reference if details else None),
            lpips=lpips,
            on_clip=on_clip,
        )
    steps = recorder.result() if other is not None and details else None
    if recorder.reason:
        unavailable["steps"] = recorder.reason
    return Comparison(
        Side(config, pipe.plan),
        None if other is None or against is None else Side(against, other.plan),
        report,
        steps,
        layers,
        unavailable,
        hardware(pipe.plan.device),
        versions(()),
    )


class _Unavailable(Exception):
    """Why something is not measured."""


def _layers(
    pipe: LightX2VPipeline, other: LightX2VPipeline, cases: Sequence[Case], steps: int, image: ImageOf | None
) -> LayerErrors:
    tested, reference = pipe.plan, other.plan
    if not (isinstance(tested, Plan) and isinstance(reference, Plan)):
        raise _Unavailable("a pipeline of diffusers runs its own loop, in which no layer is looked at by itself")
    try:
        names = changed_layers(reference, tested)
    except ConfigError as error:
        raise _Unavailable(error.what) from error
    if not names:
        raise _Unavailable("the two configurations compute every linear of the DiT in the same way")
    requests = [replace(reference.request, prompt=case.prompt, seed=case.seed) for case in cases]
    if image is not None:
        requests = [replace(request, image_path=image(request.prompt, request.seed)) for request in requests]
    found = layer_errors(reference.config, [tested.config], requests, steps)[0]
    gc.collect()
    return found


def generator(
    pipe: LightX2VPipeline,
    image: ImageOf | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Generate:
    """Prompt and seed to frames; image-to-video starts from the picture that `image` names."""
    if image is None:
        return lambda prompt, seed: pipe.generate(prompt=prompt, seed=seed, callback=callback, quiet=True)
    return lambda prompt, seed: pipe.generate(
        prompt=prompt, seed=seed, image_path=image(prompt, seed), callback=callback, quiet=True
    )


def first_frames(config: Config, folder: Path) -> ImageOf:
    """Pictures for image-to-video: the first frames that the same model, run in full, makes for task t2v."""
    pipe = pipeline_of(plain(config).model_copy(update={"task": "t2v"}))

    def path_of(prompt: str, seed: int) -> str:
        path = folder / f"{seed}.png"
        if not path.exists():
            from lightx2v.io.media import write_result

            write_result(pipe.generate(prompt=prompt, seed=seed, quiet=True)[:1], str(path), FPS, {})
        return str(path)

    return path_of
