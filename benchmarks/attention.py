"""What each 8-bit or sparse attention costs in quality on tiny-wan, against `torch_sdpa`: a table in Markdown.

    python benchmarks/attention.py --prompts 20 sage_ref_int8_fp8 fp8_ref fp8_ref_unsmoothed

`--key-offset 8` adds 8 times the root mean square of the keys to every 16th of their channels, as large models have
such channels and tiny-wan has not. The softmax does not see what is the same for all keys, so exact attention gives
the same video; 8-bit attention does where the keys are smoothed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from loguru import logger
from torch import Tensor

from lightx2v.attention.base import ATTENTION
from lightx2v.eval.suite import Clip, run_suite
from lightx2v.pipeline import LightX2VPipeline

REFERENCE = "torch_sdpa"


def pipeline(backend: str, settings: list[str]) -> LightX2VPipeline:
    from lightx2v.config.load import load_config

    return LightX2VPipeline.from_config(load_config(None, {"attention.type": backend}, settings))


def with_key_offset(name: str, offset: float) -> str:
    """Register `name` with that offset added to the keys, in float32; returns its new name."""
    backend = ATTENTION[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        keys = k.float()
        channels = torch.zeros_like(keys[:1, :1])
        channels[..., ::16] = offset * keys.square().mean().sqrt()
        return backend.fn(q.float(), keys + channels, v.float(), mask=mask, scale=scale).to(q.dtype)

    ATTENTION.add(f"{name}, keys + {offset:g}", replace(backend, fn=attend))
    return f"{name}, keys + {offset:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="+", metavar="BACKEND", help="names of attention.type")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of the prompts")
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

    print("| attention | right | PSNR mean | PSNR lowest | SSIM mean | seconds a clip |\n|---|---|---|---|---|---|")
    shifted = [with_key_offset(name, args.key_offset) for name in args.backends] if args.key_offset else []
    for backend in (*args.backends, *shifted):
        pipe = pipeline(backend, args.set)
        report = run_suite(
            lambda prompt, seed, pipe=pipe: pipe.generate(prompt=prompt, seed=seed, quiet=True),
            args.prompts,
            args.seed,
            plain,
        )
        found = report.distance_summary()
        all_four = sum(not result.wrong for result in report.results) / len(report.results)
        psnr = [f"{found[key]:.2f} dB" if found[key] is not None else "equal" for key in ("psnr_mean", "psnr_min")]
        cells = (backend, f"{all_four:.0%}", *psnr, f"{found['ssim_mean']:.4f}", f"{report.seconds_per_clip:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
