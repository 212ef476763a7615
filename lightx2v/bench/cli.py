"""Command line of `lightx2v bench`. torch is imported once the flags are known to be right."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightx2v.errors import ConfigError

if TYPE_CHECKING:
    from lightx2v.bench.peers.base import Choice
    from lightx2v.bench.report import Case
    from lightx2v.platform import DeviceInfo

DESCRIPTION = (
    "Measure how long the engine's work takes and, in the same process and in turns, the same work by other libraries."
)
PEERS_HELP = (
    "other libraries that do the same work: diffusers, torchao-int8, torchao-int8-weights, torchao-fp8, quanto-int8,"
    " quanto-fp8, bitsandbytes-int8, sdnq-int8, each also with -compile, or all that are installed"
)
TYPES = "Default,int8,fp8,fp8-b128"


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=DESCRIPTION)
    benches = parser.add_subparsers(dest="bench", metavar="{roofline,linear,dit,e2e}", required=True)

    def add(name: str, help: str, repeats: int, warmup: int) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = benches.add_parser(name, allow_abbrev=False, help=help, description=help)
        made.add_argument("--peers", metavar="NAMES", help=PEERS_HELP)
        made.add_argument(
            "--repeats", type=positive, default=repeats, metavar="N", help="samples of each (default: %(default)s)"
        )
        made.add_argument(
            "--warmup", type=positive, default=warmup, metavar="N", help="calls before them (default: %(default)s)"
        )
        made.add_argument("--threads", type=positive, metavar="N", help="threads of torch, and cores of the process")
        made.add_argument("--device", default="auto", help="auto, cpu, or another kind of device (default: auto)")
        made.add_argument("--json", action="store_true", help="print JSON")
        made.add_argument("--markdown", metavar="FILE", help="also write the results into this file, as a section")
        made.add_argument("--title", metavar="TEXT", help="of that section; one of the same title is replaced")
        made.add_argument("--debug", action="store_true", help="log everything, and show tracebacks")
        return made

    add("roofline", "copy bandwidth and the rates of matrix products, which other figures are shares of", 10, 2)
    linear = add("linear", "quantize and multiply, per library and shape, against torch's bfloat16 product", 10, 2)
    linear.add_argument("--mm_type", default=TYPES, metavar="NAMES", help="mm_types (default: %(default)s)")
    linear.add_argument(
        "--shapes", default="wan-1.3b", help="models, or weights NxK (tiny, wan-1.3b, wan-14b, wan-14b-i2v, 8960x1536)"
    )
    linear.add_argument("--rows", default="1024,4096", help="tokens (default: %(default)s)")
    linear.add_argument("--library", metavar="NAMES", help="kernel libraries for each mm_type, or all with an adapter")
    dit = add("dit", "one forward pass of a DiT of a named size, with random weights", 3, 2)
    dit.add_argument("--model", default="wan-1.3b", help="tiny, wan-1.3b (default), wan-14b, wan-14b-i2v")
    dit.add_argument("--size", default="832x480", help="width x height in pixels (default: %(default)s)")
    dit.add_argument("--frames", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    dit.add_argument("--layers", type=positive, metavar="N", help="blocks, to shorten the model (default: all)")
    dit.add_argument("--mm_type", default=TYPES, metavar="NAMES", help="mm_types (default: %(default)s)")
    dit.add_argument("--trace", action="store_true", help="also profile one call, and say where its time goes")
    dit.add_argument("--offload", choices=("block", "phase"), help="each mm_type also with its weights off the device")
    for made in (linear, dit):
        made.add_argument("--compile", action="store_true", help="the engine's layers or blocks by torch.compile")
        made.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    e2e = add("e2e", "whole runs, stage by stage", 3, 1)
    e2e.add_argument("--model_path", metavar="DIR", help="checkpoint; without it the embedded tiny-wan runs")
    e2e.add_argument("--config_json", metavar="FILE", help="JSON file of settings")
    e2e.add_argument("--prompt", default="a red circle on a white background moves right", help="what to show")
    e2e.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="any setting; repeatable")
    e2e.add_argument("--mm_type", metavar="NAMES", help="mm_types of the DiT, quantized as it loads (default: as set)")
    return parser


def positive(text: str) -> int:
    """A whole number above 0, as argparse takes a type."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def read_size(text: str) -> tuple[int, int]:
    """ "832x480" -> (832, 480). Raises ConfigError."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError("--size", f"'{text}' is not a size", allowed="width x height in pixels, such as 832x480")
    return int(match[1]), int(match[2])


def read_rows(text: str) -> list[int]:
    """ "1024,4096" -> [1024, 4096]. Raises ConfigError."""
    words = text.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise ConfigError("--rows", f"'{text}' is not a list of row counts", allowed="such as 1024,4096")
    return [int(word) for word in words]


def report_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """The words of the command that decide what is measured: without where and how to report it."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        flag, has_value, _ = word.partition("=")
        if flag in ("--markdown", "--title"):
            if not has_value:
                next(words, None)
        elif flag not in ("--json", "--debug"):
            kept.append(word)
    return tuple(kept)


Found = tuple[list["Case"], dict[str, Any], list[str]]
"""The cases, what holds for all of them, and notes."""


def _roofline(args: argparse.Namespace, device: DeviceInfo, peers: Sequence[Choice]) -> Found:
    from lightx2v.bench.measure import Timing
    from lightx2v.bench.roofline import run_roofline

    case, settings, notes = run_roofline(device, Timing(args.repeats, args.warmup))
    return [case], settings, notes


def _linear(args: argparse.Namespace, device: DeviceInfo, peers: Sequence[Choice]) -> Found:
    from lightx2v.bench.linear import run_linear
    from lightx2v.bench.measure import Timing
    from lightx2v.bench.shapes import expand_libraries, read_shapes
    from lightx2v.bench.work import read_types

    return run_linear(
        read_shapes(args.shapes),
        read_rows(args.rows),
        expand_libraries(read_types(args.mm_type), args.library),
        peers,
        device=device,
        seed=args.seed,
        use_compile=args.compile,
        timing=Timing(args.repeats, args.warmup),
    )


def _dit(args: argparse.Namespace, device: DeviceInfo, peers: Sequence[Choice]) -> Found:
    from lightx2v.bench.dit import run_dit
    from lightx2v.bench.inputs import Size
    from lightx2v.bench.measure import Timing
    from lightx2v.bench.work import read_types

    case, settings, notes = run_dit(
        args.model,
        Size(*read_size(args.size), args.frames),
        args.layers,
        read_types(args.mm_type),
        peers,
        device=device,
        seed=args.seed,
        use_compile=args.compile,
        timing=Timing(args.repeats, args.warmup),
        traced=args.trace,
        offload=args.offload,
    )
    return [case], dict(settings), notes


def _e2e(args: argparse.Namespace, device: DeviceInfo, peers: Sequence[Choice]) -> Found:
    from lightx2v.bench.e2e import run_e2e
    from lightx2v.bench.measure import Timing
    from lightx2v.bench.work import read_types
    from lightx2v.config.load import load_config

    overrides = {"prompt": args.prompt, "device": device.torch_name}
    if args.model_path is not None:
        overrides["model_path"] = args.model_path
    config = load_config(args.config_json, overrides, args.set)
    mm_types = read_types(args.mm_type) if args.mm_type else []
    case, notes = run_e2e(config, mm_types, peers, timing=Timing(args.repeats, args.warmup))
    return [case], {}, notes


RUNS: dict[str, Callable[[argparse.Namespace, DeviceInfo, Sequence[Choice]], Found]] = {
    "roofline": _roofline,
    "linear": _linear,
    "dit": _dit,
    "e2e": _e2e,
}


def main(argv: Sequence[str], prog: str = "lightx2v bench") -> int:
    """Measure, print, and write the section. Returns 0. Raises ConfigError for names that do not exist."""
    args = build_parser(prog).parse_args(argv)
    from lightx2v.bench.host import hardware, limited_threads, versions
    from lightx2v.bench.peers.base import choose
    from lightx2v.bench.report import Report, write_markdown
    from lightx2v.platform import select_device

    peers = choose(args.peers, args.bench)
    with limited_threads(args.threads):
        device = select_device(args.device)
        found = hardware(device)
        cases, settings, notes = RUNS[args.bench](args, device, peers)
    report = Report(
        args.bench,
        report_argv(argv),
        args.title or f"{args.bench}: {cases[0].title if len(cases) == 1 else args.shapes}",
        found,
        versions(module for choice in peers for module in choice.peer.modules),
        {"repeats": args.repeats, "warmup": args.warmup, "seed": getattr(args, "seed", None), **settings},
        (
            f"medians of {args.repeats} samples after {args.warmup} warm-up calls, all rows in turns in one process;"
            " the last column is the row's seconds over the first row's",
            *notes,
            *dict.fromkeys(f"{choice.peer.name}: {choice.peer.words}" for choice in peers),
        ),
        tuple(cases),
    )
    if args.markdown:
        write_markdown(Path(args.markdown), report)
    print(json.dumps(report.to_json(), indent=2) if args.json else report.text())
    return 0
