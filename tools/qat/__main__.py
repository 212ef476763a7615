"""Quantize tiny-wan's blocks to few bits, train, freeze, and say how much of the lost PSNR came back.

    python -m tools.qat --weights qint2 qint4

PSNR is against the clips of the unquantized model for the same prompts and seeds, none of which training sees. What is
lost is the difference to weights of 8 bits. Clips with a right answer are restored as well (`restore`), where the
unquantized model has a PSNR of its own to lose. `--seed` draws other prompts to choose settings with.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightx2v.eval.metrics import Clip, psnr
from lightx2v.eval.prompts import Case, draw_prompts
from lightx2v.integrations.quanto import freeze, quantize
from lightx2v.models.wan.dit import WanDiT
from tools.qat.distill import PACES, distill
from tools.qat.restore import noised, restored_psnr
from tools.qat.start import solve_blocks
from tools.qat.states import States, trajectories
from tools.qat.studio import Studio

BLOCKS = "blocks.*"
TRAINING_SEED, EVAL_SEED = 1, 0
SOLVED_WITH = 128
"""States of the teacher that the start is solved with."""


def quality(studio: Studio, model: WanDiT, requests: Sequence[Case], texts: Tensor, references: list[Clip]) -> float:
    """Mean PSNR in dB; clips that are equal to their reference, which have none, are left out."""
    clips = (studio.clip(latents) for latents in studio.sample(model, requests, texts))
    found = [psnr(clip, reference) for clip, reference in zip(clips, references, strict=True)]
    return statistics.fmean(value for value in found if math.isfinite(value))


def quantized(studio: Studio, weights: str) -> WanDiT:
    """tiny-wan's DiT whose blocks are rounded to `weights`, not frozen."""
    model = studio.model()
    quantize(model, weights=weights, include=BLOCKS)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=tuple(PACES), default=list(PACES), help="types of quanto")
    parser.add_argument("--clips", type=int, default=96, help="clips of the teacher to learn from (%(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="prompts to measure with (%(default)s)")
    parser.add_argument("--scenes", type=int, default=50, help="scenes to restore (%(default)s)")
    parser.add_argument("--seed", type=int, default=EVAL_SEED, help="of the prompts to measure with (%(default)s)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the trained weights there")
    arguments = parser.parse_args()

    studio = Studio()
    requests = draw_prompts(arguments.prompts, arguments.seed)
    teacher = studio.model()
    texts = studio.texts(requests)
    references = [studio.clip(latents) for latents in studio.sample(teacher, requests, texts)]
    ceiling_model = quantized(studio, "qint8")
    freeze(ceiling_model)
    ceiling = quality(studio, ceiling_model, requests, texts, references)
    scenes = noised(studio, arguments.scenes)
    whole = restored_psnr(teacher, scenes)
    print(f"int8: {ceiling:.2f} dB; unquantized: {whole:.3f} dB of restored scenes", flush=True)
    began = time.perf_counter()
    states: States = trajectories(studio, teacher, draw_prompts(arguments.clips, TRAINING_SEED))
    print(f"{len(states)} states of {arguments.clips} clips in {time.perf_counter() - began:.0f} s", flush=True)
    results = []
    for weights in arguments.weights:
        plain = quantized(studio, weights)
        freeze(plain)
        before, worn = quality(studio, plain, requests, texts, references), restored_psnr(plain, scenes)
        student = quantized(studio, weights)
        began = time.perf_counter()
        drawn = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
        solve_blocks(student, teacher, states.at(drawn[:SOLVED_WITH]))
        seconds = time.perf_counter() - began
        solved = quality(studio, student, requests, texts, references)
        print(f"{weights}: {before:.2f} dB rounded, {solved:.2f} dB solved in {seconds:.0f} s", flush=True)
        began = time.perf_counter()
        losses = [loss for pace in PACES[weights] for loss in distill(student, teacher, states, pace, _say)]
        seconds += time.perf_counter() - began
        freeze(student)
        after = quality(studio, student, requests, texts, references)
        share = (after - before) / (ceiling - before)
        mended = restored_psnr(student, scenes)
        restored = (mended - worn) / (whole - worn)
        results.append(
            {
                "weights": weights,
                "steps": len(losses),
                "before": before,
                "solved": solved,
                "after": after,
                "recovered": share,
                "scenes_before": worn,
                "scenes_after": mended,
                "scenes_recovered": restored,
                "loss_first": statistics.fmean(losses[:10]),
                "loss_last": statistics.fmean(losses[-10:]),
                "seconds": seconds,
            }
        )
        print(f"{weights}: {before:.2f} -> {after:.2f} dB, {share:.0%} of what was lost, {seconds:.0f} s", flush=True)
        print(f"scenes: {worn:.3f} -> {mended:.3f} dB, {restored:.0%} of what was lost", flush=True)
        if arguments.save is not None:
            arguments.save.mkdir(parents=True, exist_ok=True)
            torch.save(student.state_dict(), arguments.save / f"{weights}.pt")
    known = {"int8": ceiling, "scenes": whole, "prompts": arguments.prompts}
    print(json.dumps({**known, "results": results}))


def _say(step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"step {step}, loss {loss:.5f}", flush=True)


if __name__ == "__main__":
    main()
