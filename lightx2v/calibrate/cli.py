"""Command line of `lightx2v calibrate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError

DRAWN_PROMPTS = 8
"""Of tiny-wan's world, where the embedded model is calibrated without prompts."""


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Run requests in full, and make of what is seen in them quantized weights (--output), or what a"
        " feature cache has to know of the model (--cache).",
    )
    what = parser.add_argument_group("what is made")
    what.add_argument(
        "--output",
        metavar="DIR",
        help="quantized weights of the DiT, as `mm_config` and `calibration` say; run them with dit_quantized_ckpt",
    )
    what.add_argument(
        "--target",
        metavar="GOAL",
        help="with --output: choose each layer's mm_type for a goal: psnr=DB, memory=GIB (of the DiT's weights), or"
        " speed; mm_config.mm_type is ignored",
    )
    what.add_argument("--cache", action="store_true", help="TeaCache's polynomials and MagCache's ratios")
    what.add_argument("--save", metavar="FILE", help="with --cache: where the numbers go, as JSON, for `cache.file`")
    parser.add_argument("--model_cls", metavar="NAME", help="model family")
    parser.add_argument("--task", metavar="NAME", help="t2v, i2v, t2i or i2i")
    parser.add_argument("--model_path", metavar="DIR", help="directory of the checkpoint")
    parser.add_argument("--image_path", metavar="FILE", help="picture for i2v and i2i")
    parser.add_argument("--config_json", metavar="FILE", help="JSON file of settings: the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="any setting; repeatable")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    parser.add_argument("--prompts", metavar="FILE", help="file of prompts, one a line")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="log everything, and show tracebacks")
    return parser


def read_prompts(given: Sequence[str], file: str | None, config: Config) -> list[str]:
    """The prompts to run: those given and those of `file`, or the configuration's; for the embedded model a few of its
    own. Raises ConfigError for none."""
    prompts = list(given)
    if file is not None:
        try:
            text = Path(file).read_text("utf-8")
        except OSError as error:
            raise ConfigError("--prompts", f"'{file}' cannot be read: {error.strerror}") from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    prompts = prompts or [config.prompt]
    if prompts == [""] and config.model_path is None and config.task == "t2v":
        from lightx2v.eval.prompts import draw_prompts

        prompts = [case.prompt for case in draw_prompts(DRAWN_PROMPTS, seed=1)]
    if not all(prompts):
        raise ConfigError("--prompt", "there is none", do="give --prompt TEXT, or --prompts FILE with one a line")
    return prompts


def main(argv: Sequence[str] | None = None, prog: str = "lightx2v calibrate") -> int:
    """Measure, write the files and print what was found."""
    args = build_parser(prog).parse_args(argv)
    if args.cache == (args.output is not None):
        raise ConfigError(
            "calibrate", "what is to be made is not clear", allowed="--output DIR, or --cache --save FILE"
        )
    if args.cache != (args.save is not None):
        raise ConfigError("--save", "goes with --cache, and --cache with it", do="give both, or neither")
    if args.target is not None and args.output is None:
        raise ConfigError("--target", "goes with --output", do="give both, or neither")
    overrides = {
        name: value
        for name in ("model_cls", "task", "model_path", "image_path")
        if (value := getattr(args, name)) is not None
    }
    config = load_config(args.config_json, overrides, args.set)
    prompts = read_prompts(args.prompt, args.prompts, config)
    if args.cache:
        from lightx2v.calibrate import cache

        cache.run(config, prompts, args.save, args.json)
    else:
        from lightx2v.calibrate import weights

        weights.run(config, prompts, Path(args.output), args.target, args.json)
    return 0
