"""`lightx2v calibrate --target`: which mm_type each layer gets, for a PSNR, a size, or speed.

What quantizing each layer does to the result is predicted (`sensitivity`), choices are made by that (`assign`), and the
PSNR of a choice is measured with whole runs, by which the prediction is corrected.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from loguru import logger
from numpy.typing import NDArray
from tqdm import tqdm

from lightx2v.calibrate.assign import Choice, Option, best_within, cheapest_within, total_cost, total_error
from lightx2v.calibrate.rules import as_rules, bits_per_weight, layer_bytes
from lightx2v.calibrate.sensitivity import Sensitivity, measure
from lightx2v.calibrate.solve import plain_leaves
from lightx2v.calibrate.trial import made_layer
from lightx2v.calibrate.walk import BlockWalk
from lightx2v.config.schema import Config, MMConfig
from lightx2v.errors import ConfigError
from lightx2v.eval.metrics import psnr
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.plan.resolve import resolve
from lightx2v.platform import DeviceInfo, synchronize
from lightx2v.runner import Runner

Kind = Literal["psnr", "memory", "speed"]
LEAST_PSNR = 30.0
"""What a choice for speed keeps to, in dB."""
TRIES = 6
_NEAR = 0.5
"""dB above the goal that are near enough."""
_SEEDS = 1000
"""Seeds of the clips that choices are measured with begin so far behind those of the calibration."""


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

    choice: Choice
    predicted: float
    """dB."""
    measured: float
    """dB, the mean over clips."""
    nbytes: float
    """Of the weights of all layers that were chosen for."""
    tries: int

    def config(self, config: Config) -> Config:
        """`config` with the choice as its mm_config."""
        mm_type, rules = as_rules({name: option.mm_type for name, option in self.choice.items()})
        return config.model_copy(
            update={"mm_config": config.mm_config.model_copy(update={"mm_type": mm_type, "rules": rules})}
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        types = types_of(self.choice)
        mm_type, rules = as_rules(types)
        return {
            "mm_config": {"mm_type": mm_type, "rules": [rule.model_dump() for rule in rules]},
            "layers": dict(Counter(types.values())),
            "predicted_psnr": self.predicted,
            "measured_psnr": self.measured,
            "weight_bytes": int(self.nbytes),
            "tries": self.tries,
        }


class Chooser:
    """Chooses for the DiT of a plan with float weights."""

    def __init__(self, config: Config, walk: BlockWalk, prompts: Sequence[str], device: DeviceInfo) -> None:
        self.config, self.walk, self.device = config, walk, device
        recipe = config.calibration
        self.schemes = {name: parse(name) for name in recipe.candidates if name != "Default"}
        if not self.schemes or any(scheme.weight is None for scheme in self.schemes.values()):
            raise ConfigError(
                "calibration.candidates", f"are {list(recipe.candidates)}", allowed="Default and quantized mm_types"
            )
        self.coarse = min(self.schemes, key=lambda name: bits_per_weight(self.schemes[name].weight))
        self.prompts = [prompts[number % len(prompts)] for number in range(recipe.checks)]
        self._reference: list[NDArray[np.uint8]] = []

    def sensitivity(self) -> Sensitivity:
        """Of every layer to every candidate."""
        with tqdm(total=len(self.walk.names), desc="sensitivity", unit="part") as bar:
            return measure(
                self.walk,
                self.schemes,
                self.coarse,
                self.config.calibration.rows,
                self.device,
                lambda: bar.update() and None,
            )

    def choose(self, goal: Goal, found: Sensitivity) -> Chosen:
        """The best choice for a goal. Raises ConfigError where there is none."""
        costs = self._seconds() if goal.kind == "speed" else self._bytes()
        options = {
            layer: [
                Option(name, costs[layer][name], found.error(layer, name))
                for name in self.config.calibration.candidates
            ]
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
            return self._chosen(choice, measured, measured, 1)
        return self._for_psnr(options, goal.value)

    def _for_psnr(self, options: Mapping[str, Sequence[Option]], wanted: float) -> Chosen:
        finest = {layer: min(each, key=lambda option: (option.error, -option.cost)) for layer, each in options.items()}
        # The first offset between errors and dB is that of 8 bits throughout, which are never far off.
        middle = {
            layer: sorted(each, key=lambda option: option.error)[len(each) // 2] for layer, each in options.items()
        }
        measured = self._measure(middle)
        offset = measured + 10 * math.log10(max(total_error(middle), 1e-30))
        best = self._chosen(middle, measured, measured, 1) if measured >= wanted else None
        tried: set[tuple[str, ...]] = set()
        low, high = -math.inf, math.inf
        for number in range(2, TRIES + 2):
            allowed = 10 ** ((offset - wanted) / 10)
            choice = cheapest_within(options, allowed) or finest
            key = tuple(choice[layer].mm_type for layer in sorted(choice))
            if key in tried:
                break
            tried.add(key)
            predicted = offset - 10 * math.log10(max(total_error(choice), 1e-30))
            measured = self._measure(choice)
            logger.info("try {}: predicted {:.2f} dB, measured {:.2f} dB", number, predicted, measured)
            if measured >= wanted and (best is None or total_cost(choice) < total_cost(best.choice)):
                best = self._chosen(choice, predicted, measured, number)
            if wanted <= measured < wanted + _NEAR:
                break
            # Halve what is left once both sides are known, so that corrections do not swing.
            if measured < wanted:
                high = min(high, offset)
            else:
                low = max(low, offset)
            offset += measured - predicted
            if not low < offset < high and math.isfinite(low) and math.isfinite(high):
                offset = (low + high) / 2
        if best is None:
            raise ConfigError(
                "--target",
                f"psnr={wanted:g}: the best choice comes to {measured:.1f} dB",
                do="name finer candidates, or Default",
            )
        return best

    def _chosen(self, choice: Choice, predicted: float, measured: float, tries: int) -> Chosen:
        sizes = self._bytes()
        return Chosen(
            choice, predicted, measured, sum(sizes[layer][option.mm_type] for layer, option in choice.items()), tries
        )

    def _bytes(self) -> dict[str, dict[str, float]]:
        candidates = self.config.calibration.candidates
        return {
            layer: {name: layer_bytes(self.schemes.get(name), n, k) for name in candidates}
            for layer, (n, k) in self.walk.layers.items()
        }

    def _seconds(self) -> dict[str, dict[str, float]]:
        """Of one call of each layer, measured once for each shape."""
        shape = self.walk.plan.family.latent_shape(
            *(getattr(self.walk.plan.request, side) for side in ("height", "width", "frames"))
        )
        tokens = math.prod(shape[1:]) // math.prod(self.walk.plan.family.patch_size)
        known: dict[tuple[int, int, str], float] = {}
        for n, k in set(self.walk.layers.values()):
            weight, x = torch.randn(n, k, device=self.walk.device), torch.randn(tokens, k, device=self.walk.device)
            for name in self.config.calibration.candidates:
                known[n, k, name] = self._time(self.schemes.get(name), weight, x)
        return {
            layer: {name: known[n, k, name] for name in self.config.calibration.candidates}
            for layer, (n, k) in self.walk.layers.items()
        }

    def _time(self, scheme: Scheme | None, weight: torch.Tensor, x: torch.Tensor) -> float:
        dtype = self.walk.dtype
        x, layer = x.to(dtype), None
        if scheme is not None:
            layer = made_layer(scheme, plain_leaves(scheme, weight, x[:64].float()), None, weight, dtype, self.device)
        plain, times = weight.to(dtype), []
        for _ in range(5):
            synchronize(self.device)
            begin = time.perf_counter()
            _ = torch.nn.functional.linear(x, plain) if layer is None else layer(x)
            synchronize(self.device)
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    def _measure(self, choice: Choice) -> float:
        """Mean PSNR in dB of the clips of a choice against those of float weights."""
        mm_type, rules = as_rules(types_of(choice))
        changed = MMConfig(mm_type=mm_type, rules=rules, weight_auto_quant=True, fallback=True)
        if not self._reference:
            self._reference = self._clips(MMConfig())
        found = [psnr(clip, other) for clip, other in zip(self._clips(changed), self._reference, strict=True)]
        return float(np.mean([min(one, 100.0) for one in found]))

    def _clips(self, mm_config: MMConfig) -> list[NDArray[np.uint8]]:
        config = self.walk.plan.config.model_copy(update={"mm_config": mm_config})
        plan = resolve(config, self.device)
        runner, request = Runner(plan), plan.request
        return [
            runner.run(replace(request, prompt=prompt, seed=request.seed + _SEEDS + number), quiet=True)
            for number, prompt in enumerate(self.prompts)
        ]


def types_of(choice: Choice) -> dict[str, str]:
    """The mm_type of each layer."""
    return {layer: option.mm_type for layer, option in choice.items()}


def _first(options: Sequence[Option]) -> int:
    return 0


def _middle(options: Sequence[Option]) -> int:
    return len(options) // 2


def search_folder(output: Path) -> Path:
    """Where the search keeps its streams."""
    return output / ".incomplete-search"
