"""What each 8-bit or sparse attention costs in quality on tiny-wan, against `torch_sdpa`: a table in Markdown.

    python benchmarks/attention.py --prompts 20 sage_ref_int8_fp8 fp8_ref fp8_ref_unsmoothed

`--key-offset 8` adds 8 times the root mean square of the keys to every 16th of their channels, as large models have
such channels and tiny-wan has not. The softmax does not see what is the same for all keys, so exact attention gives
the same video; 8-bit attention does where the keys are smoothed.

`fa3_int8_static_ref` is calibrated first, with `--calibrate` prompts of another drawing: once for each way of preparing
queries and keys.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from lightx2v.attention.base import ATTENTION, AttentionFn
from lightx2v.calibrate.attention import AttentionObserver
from lightx2v.eval.prompts import draw_prompts
from lightx2v.eval.suite import Clip, run_suite
from lightx2v.io.weights import Checkpoint, write_safetensors
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.plan import Plan, resolve
from lightx2v.platform import select_device
from lightx2v.runner import Runner

REFERENCE = "torch_sdpa"


def config(backend: str, settings: Sequence[str]) -> Any:
    from lightx2v.config.load import load_config

    return load_config(None, {"attention.type": backend}, list(settings))


def pipeline(backend: str, settings: Sequence[str]) -> LightX2VPipeline:
    return LightX2VPipeline.from_config(config(backend, settings))


def shifted(k: Tensor, offset: float) -> Tensor:
    """Keys [B, S, H, Dh] with the offset, float32."""
    keys = k.float()
    channels = torch.zeros_like(keys[:1, :1])
    channels[..., ::16] = offset * keys.square().mean().sqrt()
    return keys + channels


def with_key_offset(name: str, offset: float) -> str:
    """Register `name` with that offset added to the keys, in float32; returns its new name."""
    backend = ATTENTION[name]

    def wrap(fn: AttentionFn) -> AttentionFn:
        def attend(
            q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
        ) -> Tensor:
            return fn(q.float(), shifted(k, offset), v.float(), mask=mask, scale=scale).to(q.dtype)

        return attend

    new, for_module = f"{name}, keys + {offset:g}", backend.for_module
    if for_module is not None:
        static = for_module
        ATTENTION.add(new, replace(backend, for_module=lambda module, attribute: wrap(static(module, attribute))))
    else:
        ATTENTION.add(new, replace(backend, fn=wrap(backend.fn)))
    return new


class Observer(AttentionObserver):
    """Sees the keys with their offset."""

    offset = 0.0

    def see(self, holder: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().see(holder, q, shifted(k, self.offset) if self.offset else k, v)


def calibrated(settings: Sequence[str], prompts: int, offset: float, folder: Path) -> Iterator[tuple[str, str]]:
    """What is done to queries and keys, in words, and the checkpoint with the scales for it."""
    plan = resolve(config(REFERENCE, settings), select_device("auto"))
    assert isinstance(plan, Plan)
    runner = Runner(plan)
    requests = [replace(plan.request, prompt=drawn.prompt, seed=drawn.seed) for drawn in draw_prompts(prompts, seed=1)]
    weights = plan.components["dit"].checkpoint
    checkpoint = Checkpoint.open(weights)
    for rotated, smoothed in product((False, True), repeat=2):
        observer = Observer(rotated, smoothed)
        observer.offset = offset
        with runner.components.use("dit", runner.timer) as loaded, observer.watching(loaded.model):
            for request in requests:
                runner.run(request, quiet=True)
        path = folder / f"{rotated}_{smoothed}_{offset:g}.safetensors"
        tensors = {name: tensor.clone() for name, tensor in checkpoint.stream()}
        write_safetensors(path, tensors | observer.scales(), checkpoint.metadata)
        yield f"smoothed {'yes' if smoothed else 'no'}, rotated {'yes' if rotated else 'no'}", str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="+", metavar="BACKEND", help="names of attention.type")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of the prompts")
    parser.add_argument("--calibrate", type=int, default=4, metavar="N", help="prompts that scales are found with")
    parser.add_argument("--key-offset", type=float, metavar="N", help="run them with this offset of the keys as well")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="any setting; repeatable")
    args = parser.parse_args()
    logger.remove()
    reference = pipeline(REFERENCE, args.set)
    clips: dict[tuple[str, int], Clip] = {}

    def plain(prompt: str, seed: int) -> Clip:
        if (prompt, seed) not in clips:
            clips[prompt, seed] = reference.generate(prompt=prompt, seed=seed, quiet=True)
        return clips[prompt, seed]

    def row(label: str, backend: str, settings: Sequence[str]) -> None:
        pipe = pipeline(backend, settings)
        report = run_suite(
            lambda prompt, seed: pipe.generate(prompt=prompt, seed=seed, quiet=True), args.prompts, args.seed, plain
        )
        found = report.distance_summary()
        all_four = report.right()["all"] / len(report.results)
        psnr = [f"{found[key]:.2f} dB" if found[key] is not None else "equal" for key in ("psnr_mean", "psnr_min")]
        cells = (label, f"{all_four:.0%}", *psnr, f"{found['ssim_mean']:.4f}", f"{report.seconds_per_clip:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)

    print("| attention | right | PSNR mean | PSNR lowest | SSIM mean | seconds a clip |\n|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for offset in (0.0, args.key_offset) if args.key_offset else (0.0,):
            for name in args.backends:
                backend = with_key_offset(name, offset) if offset else name
                if ATTENTION[name].for_module is None:
                    row(backend, backend, args.set)
                    continue
                for how, path in calibrated(args.set, args.calibrate, offset, Path(folder)):
                    row(f"{backend}, {how}", backend, [*args.set, f"dit_quantized_ckpt={path}"])


if __name__ == "__main__":
    main()
