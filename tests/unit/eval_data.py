"""A comparison made by hand, for tests of what shows one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from lightx2v.bench.host import hardware, versions
from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.eval.compare import Comparison, Side
from lightx2v.eval.layer_report import LayerError, LayerErrors
from lightx2v.eval.metrics import Clip
from lightx2v.eval.pictures import Album
from lightx2v.eval.prompts import Case, draw_prompts
from lightx2v.eval.steps import StepErrors
from lightx2v.eval.suite import run_cases
from lightx2v.platform import select_device

STRANGE = 'a "cat" <script>alert(1)</script> & more'


def side(config: Config, weights: dict[str, int]) -> Side:
    parts = {name: SimpleNamespace(weight_bytes=size) for name, size in weights.items()}
    plan = SimpleNamespace(hash="0123456789ab", components=parts, memory=SimpleNamespace(peak=3 * 2**20))
    return Side(config, cast(Any, plan))


def layer_errors() -> LayerErrors:
    layers = [
        LayerError(f"blocks.{block}.{kind}", "int4-g128", "Default", 384, 128, 25_000, error, {0: error, 7: error / 2})
        for block in range(3)
        for kind, error in (("self_attn.q", 0.01 + 0.002 * block), ("ffn.2", 0.03 + 0.01 * block))
    ]
    return LayerErrors(tuple(sorted(layers, key=lambda layer: -layer.error)), (0, 7), 2, ("blocks.0.norm3.weight",))


def comparison(album: Album, *, size: int = 64, frames: int = 5, with_reference: bool = True) -> Comparison:
    """Drawn sentences and one strange prompt, by noise beside a gray picture; every third clip is equal."""
    rng = np.random.default_rng(0)

    def noisy(prompt: str, seed: int) -> Clip:
        strength = seed % 3 * 10
        return (128 + rng.integers(-strength, strength + 1, (frames, size, size, 3))).astype(np.uint8)

    def gray(prompt: str, seed: int) -> Clip:
        return np.full((frames, size, size, 3), 128, np.uint8)

    cases = [Case(STRANGE, 2), *(Case(case.prompt, number, case.scene) for number, case in enumerate(draw_prompts(8)))]
    report = run_cases(noisy, cases, gray if with_reference else None, on_clip=album.add)
    rules = [{"match": "blocks.0.*<b>", "mm_type": "Default"}]
    tested = load_config(None, {"mm_config.mm_type": "int4-g128", "mm_config.rules": rules, "sampling.steps": 8})
    reference = load_config(None, {"sampling.steps": 8})
    device = select_device("cpu")
    return Comparison(
        side(tested, {"dit": 2_000_000, "t5": 500_000}),
        side(reference, {"dit": 7_000_000, "t5": 500_000}) if with_reference else None,
        report,
        StepErrors(((0.01, 0.02, 0.05), (0.02, 0.03, 0.08))) if with_reference else None,
        layer_errors() if with_reference else None,
        {"lpips": "not <installed>"} if with_reference else {},
        hardware(device),
        versions(()),
    )
