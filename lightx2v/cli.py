"""The `lightx2v` command. Imports only the standard library at the top, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lightx2v.errors import ConfigError, LightX2VError, suggestion

if TYPE_CHECKING:
    from lightx2v.config.schema import Config

SETTING_FLAGS = (
    ("model_cls", "model family (wan2.1, flux), or diffusers for a pipeline directory of it"),
    ("task", "t2v, i2v, t2i or i2i: what is made of what, text, image or video"),
    ("model_path", "directory of the checkpoint; without it the embedded tiny-wan runs"),
    ("prompt", "what to show"),
    ("negative_prompt", "what to keep away from"),
    ("image_path", "first frame for i2v, or the image to change for i2i"),
    ("device", "auto, cpu, or another kind of device with or without an index (xpu:1)"),
)
HELP = {
    "generate": "Make a video or an image from a prompt, and from an image.",
    "explain": "Print what would run, on which kernels and why, without loading weights.",
    "convert": "Convert a checkpoint: layout, quantization, LoRA.",
    "calibrate": "Measure what a feature cache has to know of a model.",
    "eval": "Measure what a configuration costs against the plain model.",
    "bench": "Measure speed, and other libraries' speed beside it.",
    "doctor": "Print the devices, the versions, and which kernel libraries are there.",
    "schema": "Print the JSON Schema of the settings.",
}
"""Every verb and what it does."""


class Parser(argparse.ArgumentParser):
    """Flags are never abbreviated, and an unknown one gets a suggestion."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="log everything, and show tracebacks")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument '{flag}'{suggestion(flag, self._option_string_actions)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n  do: see {self.prog} --help\n")


def run_parser(prog: str, description: str, dry_run: bool) -> Parser:
    """The parser of `generate` and `explain`: LightX2V's flags, `--set`, and how to report."""
    parser = Parser(prog, description)
    for name, text in SETTING_FLAGS:
        parser.add_argument(f"--{name}", metavar="TEXT", help=text)
    parser.add_argument("--config_json", metavar="FILE", help="JSON file of settings; flags win over it")
    parser.add_argument("--seed", type=int, help="seed of the initial noise")
    parser.add_argument(
        "--save_result_path",
        "--save_video_path",
        metavar="PATH",
        help="result: .mp4, .gif, .webp, .png, or a folder ending in '/' (default: ./output_lightx2v.mp4 or .png)",
    )
    parser.add_argument("--warmup", action="store_true", help="serve the request once before the one that counts")
    parser.add_argument("--use_prompt_enhancer", action="store_true", help="not supported by this version")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="any setting, after all else; repeatable (keys: lightx2v schema)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return parser


def run_config(args: argparse.Namespace) -> Config:
    """The settings behind the flags. Raises ConfigError."""
    from loguru import logger

    from lightx2v.config.load import load_config

    if args.use_prompt_enhancer:
        raise ConfigError("--use_prompt_enhancer", "not supported by this version", do="write the long prompt yourself")
    names = [name for name, _ in SETTING_FLAGS] + ["seed", "save_result_path"]
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.warmup:
        overrides["warmup"] = True
    config = load_config(args.config_json, overrides, args.set)
    if config.model_path is None:
        logger.info("no model_path is given: the embedded tiny-wan runs")
    return config


def print_plan(config: Config, as_json: bool) -> None:
    """Resolve `config` on its device and print the plan."""
    from lightx2v.runner import open_plan

    plan = open_plan(config)
    print(json.dumps(plan.to_json(), indent=2) if as_json else plan.render())


def generate(prog: str, argv: Sequence[str]) -> int:
    args = run_parser(prog, HELP["generate"], dry_run=True).parse_args(argv)
    start_log(args.debug)
    config = run_config(args)
    if args.dry_run:
        print_plan(config, args.json)
        return 0
    from lightx2v.runner import generate as run

    path = run(config)
    print(json.dumps({"result": str(path)}) if args.json else path)
    return 0


def explain(prog: str, argv: Sequence[str]) -> int:
    args = run_parser(prog, HELP["explain"], dry_run=False).parse_args(argv)
    start_log(args.debug)
    print_plan(run_config(args), args.json)
    return 0


def doctor(prog: str, argv: Sequence[str]) -> int:
    parser = Parser(prog, HELP["doctor"])
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    start_log(args.debug)
    from lightx2v.doctor import examine, render

    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def schema(prog: str, argv: Sequence[str]) -> int:
    parser = Parser(prog, HELP["schema"])
    parser.add_argument("--markdown", action="store_true", help="print a table of the settings instead")
    args = parser.parse_args(argv)
    from lightx2v.config.schema import schema_text, settings_page

    print(settings_page() if args.markdown else schema_text(), end="")
    return 0


def convert(prog: str, argv: Sequence[str]) -> int:
    start_log("--debug" in argv)
    from lightx2v.convert.cli import main as run

    return run(argv)


def evaluate(prog: str, argv: Sequence[str]) -> int:
    start_log("--debug" in argv)
    from lightx2v.eval.cli import main as run

    return run(argv)


def bench(prog: str, argv: Sequence[str]) -> int:
    start_log("--debug" in argv)
    from lightx2v.bench.cli import main as run

    return run(argv, prog)


def calibrate(prog: str, argv: Sequence[str]) -> int:
    start_log("--debug" in argv)
    from lightx2v.calibrate.cli import main as run

    return run(argv, prog)


VERBS: dict[str, Callable[[str, Sequence[str]], int]] = {
    "generate": generate,
    "explain": explain,
    "convert": convert,
    "calibrate": calibrate,
    "eval": evaluate,
    "bench": bench,
    "doctor": doctor,
    "schema": schema,
}


def start_log(debug: bool) -> None:
    """Send the log to stderr: INFO and above, everything with `debug`."""
    from loguru import logger

    logger.remove()
    logger.add(
        sys.stderr,
        level="DEBUG" if debug else "INFO",
        format="<green>{time:HH:mm:ss}</green> <level>{level:<7}</level> {message}",
    )


def guarded(run: Callable[[], int], debug: bool) -> int:
    """The exit code of `run`; every exception becomes a message on stderr, with a traceback only when `debug`."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of stdout went away, as in `lightx2v schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explained(error, debug)
        print(message, file=sys.stderr)
        return code


def _explained(error: BaseException, debug: bool) -> tuple[str, int]:
    """The message and the exit code of an error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, LightX2VError):
        return str(error), error.exit_code
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    hint = "" if debug else "\n  do: run again with --debug"
    return f"{type(error).__name__}: {first_line}{hint}", 1


def run_verb(verb: str, prog: str, argv: Sequence[str]) -> int:
    """Run one verb and return its exit code. A wrong flag raises SystemExit(2), as argparse does."""
    return guarded(lambda: VERBS[verb](prog, argv), "--debug" in argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: `lightx2v VERB ...`. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    lines = [f"  {name:<10} {text}" for name, text in HELP.items()]
    parser = argparse.ArgumentParser(
        "lightx2v",
        "lightx2v VERB ...",
        "Inference with video diffusion transformers, every matrix multiplication chosen by name.",
        "\n".join(["verbs:", *lines, "", "`lightx2v VERB --help` lists the flags of a verb."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        from lightx2v import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        kind = "argument" if verb.startswith("-") else "verb"
        print(f"lightx2v: unknown {kind} '{verb}'{suggestion(verb, VERBS)}", file=sys.stderr)
        print(f"  allowed: {', '.join(VERBS)}\n  do: see lightx2v --help", file=sys.stderr)
        return 2
    return run_verb(verb, f"lightx2v {verb}", rest)


if __name__ == "__main__":
    sys.exit(main())
