"""`lightx2v calibrate --target`: which mm_type each layer gets, for a PSNR, a size, or speed.

Each layer is made in every candidate mm_type (`variants`). What that does to the result is predicted (`sensitivity`),
choices are made by that (`assign`), and the PSNR of a choice is measured with whole runs (`clips`), by which the
prediction is corrected (`search`). The weights that were measured are those that are written.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from lightx2v.calibrate.assign import Choice, Option, best_within
from lightx2v.calibrate.clips import Clips, Measured
from lightx2v.calibrate.output import Output
from lightx2v.calibrate.rules import as_rules, bits_per_weight
from lightx2v.calibrate.search import Search
from lightx2v.calibrate.sensitivity import Sensitivity, measure
from lightx2v.calibrate.solve import check_recipe
from lightx2v.calibrate.trial import made_layer
from lightx2v.calibrate.variants import Variants
from lightx2v.calibrate.walk import BlockWalk
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.mm.scheme import parse
from lightx2v.platform import DeviceInfo, synchronize

Kind = Literal["psnr", "memory", "speed"]
LEAST_PSNR = 30.0
"""What a choice for speed keeps to, in dB."""


@dataclass(frozen=True)
class Goal:
    """What is wanted."""

    kind: Kind
    value: float
    """dB; GiB; the least dB."""

    @staticmethod
    def parse(text: str) -> Goal:
        """Of "psnr=30", "memory=8GB" (GiB), "speed" or "speed=32" (the least dB). Raises ConfigError."""
        kind, _, value = text.partition("=")
        number = value.upper().removesuffix("GIB").removesuffix("GB").removesuffix("DB")
        try:
            found = float(number) if value or kind != "speed" else LEAST_PSNR
        except ValueError:
            found = math.nan
        if kind not in ("psnr", "memory", "speed") or not (0 < found < math.inf):
            raise ConfigError(
                "--target", f"'{text}'", allowed="psnr=DB, memory=GIB, speed, or speed=DB (the least PSNR)"
            )
        return Goal(kind, found)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Chosen:
    """One choice for all layers, and what is known of it."""

    types: Mapping[str, str]
    """mm_types by layer."""
    predicted: float
    """dB, before it was measured."""
    measured: Measured
    nbytes: float
    """Of the weights of all layers that were chosen for."""
    bits: float
    """Of these for each weight."""
    tries: int
    """Choices that were measured."""

    @property
    def mm_type(self) -> str:
        """The commonest."""
        return as_rules(self.types)[0]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        mm_type, rules = as_rules(self.types)
        return {
            "mm_config": {"mm_type": mm_type, "rules": [rule.model_dump() for rule in rules]},
            "layers": dict(Counter(self.types.values())),
            "predicted_psnr": self.predicted,
            "measured_psnr": self.measured.mean,
            "standard_error": self.measured.error,
            "weight_bytes": int(self.nbytes),
            "bits_per_weight": self.bits,
            "tries": self.tries,
        }


class Chooser:
    """Chooses for the DiT of a plan with float weights, whose requests `walk` has run; `folder` holds what it makes."""

    def __init__(
        self, config: Config, walk: BlockWalk, prompts: Sequence[str], device: DeviceInfo, folder: Path
    ) -> None:
        self.recipe, self.walk, self.device, self.folder = config.calibration, walk, device, folder
        self.candidates = self.recipe.candidates
        schemes = {name: parse(name) for name in self.candidates if name != "Default"}
        if not schemes or any(scheme.weight is None for scheme in schemes.values()):
            raise ConfigError(
                "calibration.candidates", f"are {list(self.candidates)}", allowed="Default and quantized mm_types"
            )
        check_recipe(self.recipe, schemes)
        self.variants = Variants(folder / "variants", walk, schemes, self.recipe, device)
        self.clips = Clips(walk.plan, [prompts[number % len(prompts)] for number in range(self.recipe.checks)])

    def sensitivity(self) -> Sensitivity:
        """Of every layer to every candidate, which are made here."""
        by_bits = sorted(self.variants.schemes, key=lambda name: bits_per_weight(self.variants.schemes[name].weight))
        middle = by_bits[(len(by_bits) - 1) // 2]
        with tqdm(total=len(self.walk.names), desc="sensitivity", unit="part") as bar:
            return measure(self.walk, self.variants, middle, lambda: bar.update() and None)

    def choose(self, goal: Goal, found: Sensitivity) -> Chosen:
        """The best choice for a goal. Raises ConfigError where there is none."""
        cost = self._seconds() if goal.kind == "speed" else self.variants.nbytes
        options = {
            layer: [Option(name, cost(layer, name), found.error(layer, name)) for name in self.candidates]
            for layer in self.walk.layers
        }
        if goal.kind == "memory":
            choice = best_within(options, goal.value * 2**30)
            if choice is None:
                least = sum(min(option.cost for option in each) for each in options.values()) / 2**30
                raise ConfigError(
                    "--target", f"memory={goal.value:g}", allowed=f"{least:.3g} GiB or more with these candidates"
                )
            measured = self._measure(choice)
            return self._chosen(choice, measured.mean, measured, 1)
        search = Search(options, goal.value, self._measure, self.recipe.margin)
        best = search.best()
        if best is None:
            most = max(search.tries, key=search.reached).measured
            raise ConfigError(
                "--target",
                f"psnr={goal.value:g}: the best choice comes to {most.mean:.1f} ± {most.error:.1f} dB",
                do="name finer candidates, or Default, or measure with more clips (calibration.checks)",
            )
        return self._chosen(best.choice, best.predicted, best.measured, len(search.tries))

    def write(self, chosen: Chosen, output: Output) -> None:
        """The files of the weights that were measured, to be published."""
        self.variants.assemble(chosen.types, output)

    def _chosen(self, choice: Choice, predicted: float, measured: Measured, tries: int) -> Chosen:
        types = types_of(choice)
        nbytes = sum(self.variants.nbytes(layer, mm_type) for layer, mm_type in types.items())
        weights = sum(n * k for n, k in self.walk.layers.values())
        return Chosen(types, predicted, measured, nbytes, 8 * nbytes / weights, tries)

    def _measure(self, choice: Choice) -> Measured:
        """The PSNR of the clips of a choice, of a checkpoint as it would be written."""
        trial = Output(self.folder / "trial", self.folder / "trial" / ".incomplete", "")
        self.variants.assemble(types_of(choice), trial)
        trial.publish(self.walk.names, {})
        return self.clips.measure(trial.folder)

    def _seconds(self) -> Callable[[str, str], float]:
        """Of one call of a layer as one of the candidates, measured once for each shape."""
        plan = self.walk.plan
        shape = plan.family.latent_shape(*(getattr(plan.request, side) for side in ("height", "width", "frames")))
        tokens = math.prod(shape[1:]) // math.prod(plan.family.patch_size)
        known: dict[tuple[int, int], dict[str, float]] = {}
        for layer, (n, k) in self.walk.layers.items():
            if (n, k) not in known:
                x = torch.randn(tokens, k, device=self.walk.device).to(self.walk.dtype)
                known[n, k] = {name: self._time(layer, name, x) for name in self.candidates}
        return lambda layer, name: known[self.walk.layers[layer]][name]

    def _time(self, name: str, mm_type: str, x: torch.Tensor) -> float:
        weight = torch.randn(*self.walk.layers[name], device=self.walk.device).to(self.walk.dtype)
        layer, times = None, []
        if mm_type != "Default":
            scheme, leaves = self.variants.schemes[mm_type], self.variants.leaves(name, mm_type)
            layer = made_layer(scheme, leaves, None, weight, self.walk.dtype, self.device)
        for _ in range(5):
            synchronize(self.device)
            begin = time.perf_counter()
            _ = torch.nn.functional.linear(x, weight) if layer is None else layer(x)
            synchronize(self.device)
            times.append(time.perf_counter() - begin)
        return min(times[1:])


def types_of(choice: Choice) -> dict[str, str]:
    """The mm_type of each layer."""
    return {layer: option.mm_type for layer, option in choice.items()}
