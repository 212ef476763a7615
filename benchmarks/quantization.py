"""What quantizing tiny-wan's transformer costs, recipe by recipe: PSNR and adherence beside bytes. See `--help`.

PYTHONPATH=. python benchmarks/quantization.py --prompts 50 --json quality.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from loguru import logger

from lightx2v import LightX2VPipeline
from lightx2v.bench.host import hardware, versions
from lightx2v.calibrate.target import Goal
from lightx2v.calibrate.weights import calibrate, calibrate_for
from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.eval.detector import detect
from lightx2v.eval.metrics import psnr
from lightx2v.eval.prompts import ATTRIBUTES, Case, draw_prompts
from lightx2v.platform import select_device

CALIBRATION_PROMPTS = tuple(request.prompt for request in draw_prompts(8, seed=1))
PROMPTS = 50
_DRAWN = dict.fromkeys(request.prompt for request in draw_prompts(80, seed=1))
_TOLD = {request.prompt for request in draw_prompts(PROMPTS)}
TARGET_PROMPTS = tuple(one for one in _DRAWN if one not in _TOLD)[:32]
"""Of rows with a star, some of which measure a choice with each: none that the table is measured with."""


@dataclass(frozen=True)
class Row:
    """One recipe: an mm_type, what `calibrate` does for it, and other settings. Without a recipe, weights are rounded
    as they load."""

    name: str
    mm_type: str = "Default"
    recipe: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    prompts: tuple[str, ...] = CALIBRATION_PROMPTS


def recipe(**given: Any) -> dict[str, Any]:
    return {"sensitive": "none", **given}


SVD = {"smooth": "svdquant", "rank": 32}
MIXED = {"solver": "gptq", "checks": len(TARGET_PROMPTS), "margin": 2}
ROWS = [
    Row("W8A8 dynamic", "int8"),
    Row("W8A8 static, minmax", "int8-static-asym", recipe()),
    Row("W8A8 static, symmetric", "int8-static", recipe()),
    Row("W8A8 static, percentile", "int8-static-asym", recipe(observer="percentile")),
    Row("W8A8 static, histogram", "int8-static-asym", recipe(observer="histogram")),
    Row("W8A8 static, mse", "int8-static-asym", recipe(observer="mse")),
    Row("W8A8 timestep, 1 group", "int8-timestep", recipe()),
    Row("W8A8 timestep, 3 groups", "int8-timestep", recipe(step_groups=3)),
    Row("W8A8 static, SmoothQuant", "int8-static-asym", recipe(smooth="smoothquant")),
    Row("W8A8 static, AWQ", "int8-static-asym", recipe(smooth="awq")),
    Row("W8A8 static, iterative", "int8-static-asym", recipe(smooth="iterative")),
    Row("W8A8 static, flexible", "int8-static-asym", recipe(smooth="flexible")),
    Row("W8A8 dynamic, SmoothQuant", "int8", recipe(smooth="smoothquant")),
    Row("W8A8 dynamic, rotated", "int8", recipe(rotation="auto")),
    Row("fp8 per token", "fp8"),
    Row("fp8 per tensor, static", "fp8-pertensor", recipe()),
    Row("LLM.int8", "llm-int8"),
    Row("8-bit attention, K smoothed", settings={"attention.type": "sage_ref_int8_fp8"}),
    Row("W8A8 dynamic, 8-bit attention", "int8", settings={"attention.type": "sage_ref_int8_fp8"}),
    Row("W4A4 int4 naive", "int4-w4a4"),
    Row("W4A4 int4, smoothed", "int4-w4a4", recipe(smooth="svdquant")),
    Row("W4A4 int4, SVDQuant r8", "int4-w4a4", recipe(**{**SVD, "rank": 8})),
    Row("W4A4 int4, SVDQuant r32", "int4-w4a4", recipe(**SVD)),
    Row("W4A4 int4, SVDQuant r32 + GPTQ", "int4-w4a4", recipe(**SVD, solver="gptq")),
    Row("W4A4 int4, data-free SVDQuant r32", "int4-w4a4", recipe(rank=32)),
    Row("W4A4 int4, rotated", "int4-w4a4", recipe(rotation="auto")),
    Row("W4A4 nvfp4 naive", "nvfp4"),
    Row("W4A4 nvfp4, SVDQuant r32", "nvfp4", recipe(**SVD)),
    Row("NF4", "nf4"),
    Row("NF4, double quantization", "nf4-double"),
    Row("NF4, double quantization, GPTQ *", "nf4-double", recipe(solver="gptq"), prompts=TARGET_PROMPTS),
    Row("FP4", "fp4"),
    Row("int4 g64", "int4-g64-asym"),
    Row("int4 g64, GPTQ", "int4-g64-asym", recipe(solver="gptq")),
    Row("int4 g64, HQQ", "int4-g64-asym", recipe(solver="hqq")),
    Row("int4 g64, AWQ", "int4-g64-asym", recipe(smooth="awq")),
    Row("int3 g64", "int3-g64-asym"),
    Row("int3 g64, GPTQ", "int3-g64-asym", recipe(solver="gptq")),
    Row("int3 g64, HQQ", "int3-g64-asym", recipe(solver="hqq")),
    Row("int3 g128, GPTQ *", "int3-g128-asym", recipe(solver="gptq"), prompts=TARGET_PROMPTS),
    Row("int2 g64", "int2-g64-asym"),
    Row("int2 g64, GPTQ", "int2-g64-asym", recipe(solver="gptq")),
    Row("int2 g64, HQQ", "int2-g64-asym", recipe(solver="hqq")),
    Row("mixed for 36 dB *", recipe=recipe(**MIXED), target="psnr=36", prompts=TARGET_PROMPTS),
    Row("mixed for 40 dB *", recipe=recipe(**MIXED), target="psnr=40", prompts=TARGET_PROMPTS),
    Row("mixed for 46 dB *", recipe=recipe(**MIXED), target="psnr=46", prompts=TARGET_PROMPTS),
]


def config_of(row: Row, folder: Path) -> tuple[Config, dict[str, Any]]:
    """What runs, after calibrating where the row asks for it; and what is told of the calibration."""
    settings: dict[str, Any] = {**row.settings}
    if row.recipe is None:
        automatic = {} if row.mm_type == "Default" else {"mm_config.weight_auto_quant": True}
        return load_config(None, {**settings, "mm_config.mm_type": row.mm_type, **automatic}), {}
    asked = {f"calibration.{key}": value for key, value in row.recipe.items()}
    config = load_config(None, {**settings, **asked, "mm_config.mm_type": row.mm_type})
    told: dict[str, Any] = {}
    with torch.inference_mode():
        if row.target is None:
            report = calibrate(config, row.prompts, folder)
        else:
            chosen, report = calibrate_for(config, row.prompts, folder, Goal.parse(row.target))
            told = chosen.to_json()
    told["seconds"] = report.seconds
    loaded = {"mm_config.mm_type": "auto", "dit_quantized_ckpt": str(folder)}
    return load_config(None, {**settings, **loaded}), told


def clips(config: Config, requests: Sequence[Case]) -> tuple[list[np.ndarray], LightX2VPipeline]:
    pipe = LightX2VPipeline.from_config(config)
    return [pipe.generate(one.prompt, seed=one.seed, quiet=True) for one in requests], pipe


def measured(row: Row, requests: Sequence[Case], reference: Sequence[np.ndarray]) -> dict[str, Any]:
    """One row of the table."""
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        config, told = config_of(row, Path(folder))
        made, pipe = clips(config, requests)
        layers = pipe.plan.components["dit"]
        nbytes = sum(layers.layer_bytes.get(p.name, 2 * p.in_features * p.out_features) for p in layers.layers)
    weights = sum(p.in_features * p.out_features for p in layers.layers)
    distances = [min(psnr(clip, other), 100.0) for clip, other in zip(made, reference, strict=True)]
    found = [detect(clip) for clip in made]
    right = [
        all(getattr(f, a) == getattr(r.scene, a) for a in ATTRIBUTES) for f, r in zip(found, requests, strict=True)
    ]
    return {
        "name": row.name,
        "mm_type": row.mm_type,
        "bits": 8 * nbytes / weights,
        "psnr": statistics.fmean(distances),
        "psnr_error": statistics.stdev(distances) / math.sqrt(len(distances)) if len(distances) > 1 else 0.0,
        "lowest": min(distances),
        "right": sum(right),
        "of": len(right),
        "seconds": time.perf_counter() - begin,
        "told": told,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| recipe | mm_type | bits a weight | PSNR mean | lowest | right |", "|---|---|---|---|---|---|"]
    for row in rows:
        share = "all" if row["right"] == row["of"] else f"{row['right']} of {row['of']}"
        name, mm_type = row["name"], "" if row["mm_type"] == "Default" else f"`{row['mm_type']}`"
        lines.append(
            f"| {name} | {mm_type} | {row['bits']:.2f} | {row['psnr']:.2f} ± {row['psnr_error']:.2f} dB "
            f"| {row['lowest']:.2f} dB | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names contain one of these words")
    parser.add_argument("--json", type=Path, help="where the figures go, after each row")
    args = parser.parse_args()
    logger.remove()
    rows = [row for row in ROWS if not args.only or any(word in row.name for word in args.only)]
    requests = draw_prompts(args.prompts, seed=0)
    reference, _ = clips(load_config(None, {}), requests)
    done: list[dict[str, Any]] = []
    for row in rows:
        done.append(measured(row, requests, reference))
        print(table(done[-1:]).splitlines()[-1], flush=True)
        if args.json is not None:
            told = {
                "hardware": hardware(select_device("cpu")),
                "versions": versions(("torch",)),
                "prompts": args.prompts,
                "rows": done,
            }
            args.json.write_text(json.dumps(told, indent=2, default=str))
    print(table(done))


if __name__ == "__main__":
    main()
