"""Command line of `lightx2v eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from loguru import logger
from tqdm import tqdm

from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.eval.metrics import load_lpips
from lightx2v.eval.suite import Clip, Generate, Result, run_suite, table

if TYPE_CHECKING:
    from lightx2v.pipeline import LightX2VPipeline

SHEET_FPS = 8


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Generate drawn prompts of the tiny-wan world and count the clips that show what was asked for."
        " A configuration that trades quality for time or memory is also compared with the plain one, clip by clip.",
    )
    parser.add_argument("--suite", choices=("tiny-wan",), default="tiny-wan", help="set of prompts (tiny-wan)")
    parser.add_argument("--prompts", type=int, default=200, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing of the prompts (default: %(default)s)")
    parser.add_argument("--config_json", metavar="FILE", help="JSON file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="any setting; repeatable")
    parser.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        help="also run the same settings in full precision and in full, and compare (default: where they differ)",
    )
    parser.add_argument("--save", metavar="DIR", help="write each wrong clip there, as a contact sheet")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="log everything, and show tracebacks")
    return parser


EXACT = ("mm_config", "dit_quantized_ckpt", "t5", "clip", "attention", "cache", "offload", "vae", "compile", "graphs")
"""Sections whose defaults leave nothing out and round nothing that the model's dtype does not."""
EXACT_SAMPLING = ("cfg_schedule", "changing_resolution", "resolution_rate", "changing_resolution_steps")


def plain(config: Config) -> Config:
    """The same settings without whatever trades quality for time or memory. LoRAs and the sampler stay."""
    sampling = {name: type(config.sampling).model_fields[name].get_default() for name in EXACT_SAMPLING}
    sections = {name: Config.model_fields[name].get_default() for name in EXACT}
    return config.model_copy(update=sections | {"sampling": config.sampling.model_copy(update=sampling)})


def pipeline_of(config: Config) -> LightX2VPipeline:
    """The pipeline of `config`. Raises ConfigError when it does not resolve."""
    from lightx2v.pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config)


def generator(pipe: LightX2VPipeline, first_frame: Callable[[str, int], str] | None = None) -> Generate:
    """Prompt and seed to frames; image-to-video starts from the picture that `first_frame` gives the path of."""
    if first_frame is None:
        return lambda prompt, seed: pipe.generate(prompt=prompt, seed=seed, quiet=True)
    return lambda prompt, seed: pipe.generate(
        prompt=prompt, seed=seed, image_path=first_frame(prompt, seed), quiet=True
    )


def first_frames(config: Config, folder: Path) -> Callable[[str, int], str]:
    """Pictures for image-to-video: the first frames that the same model, run in full, makes for task t2v."""
    pipe = pipeline_of(plain(config).model_copy(update={"task": "t2v"}))

    def path_of(prompt: str, seed: int) -> str:
        path = folder / f"{seed}.png"
        if not path.exists():
            from lightx2v.io.media import write_result

            write_result(pipe.generate(prompt=prompt, seed=seed, quiet=True)[:1], str(path), SHEET_FPS, {})
        return str(path)

    return path_of


def save_wrong(folder: Path) -> Callable[[Result, Clip], None]:
    """Writes the contact sheet of a clip that shows something else than asked; its metadata say what."""
    from lightx2v.io.media import write_result

    number = 0

    def save(result: Result, clip: Clip) -> None:
        nonlocal number
        if result.wrong:
            saw = {name: str(getattr(result.found, name)) for name in result.wrong}
            words = [result.request.scene.prompt.replace(" ", "_"), *(f"{name}-{value}" for name, value in saw.items())]
            metadata = {"prompt": result.request.scene.prompt, "seed": str(result.request.seed), "saw": json.dumps(saw)}
            path = folder / f"{number:04d}_{'_'.join(words).replace(' ', '_')}.png"
            write_result(clip, str(path), SHEET_FPS, metadata)
        number += 1

    return save


def main(argv: Sequence[str] | None = None, prog: str = "lightx2v eval") -> int:
    """Run the suite and print its report. Returns 0, whatever the shares are."""
    args = build_parser(prog).parse_args(argv)
    if args.prompts < 1:
        raise ConfigError("--prompts", f"{args.prompts}", allowed="1 or more")
    config = load_config(args.config_json, {}, args.set)
    compared = plain(config)
    with_reference = args.reference if args.reference is not None else compared != config
    pipe = pipeline_of(config)
    reference_pipe = pipeline_of(compared) if with_reference else None
    lpips, reason = load_lpips() if with_reference else (None, "")
    if reason:
        logger.info("no LPIPS: {}", reason)
    save = save_wrong(Path(args.save)) if args.save else None
    with tqdm(total=args.prompts, desc=args.suite, unit="clip") as bar, TemporaryDirectory() as folder:
        image = first_frames(config, Path(folder)) if config.task == "i2v" else None
        reference = generator(reference_pipe, image) if reference_pipe is not None else None

        def on_clip(result: Result, clip: Clip) -> None:
            bar.update()
            if save is not None:
                save(result, clip)

        report = run_suite(generator(pipe, image), args.prompts, args.seed, reference, lpips=lpips, on_clip=on_clip)
    if args.json:
        head = {"suite": args.suite, "seed": args.seed, "mm_type": config.mm_config.mm_type, "plan": pipe.plan.hash}
        print(json.dumps(head | report.to_json(), indent=2))
    else:
        print(f"{args.suite}, seed {args.seed}, mm_type {config.mm_config.mm_type}, plan {pipe.plan.hash}")
        print(table(report))
    return 0
