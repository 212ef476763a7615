"""Command line of `lightx2v eval`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.eval.cases import COUNT, make_cases
from lightx2v.eval.compare import DETAILS, FPS, compare
from lightx2v.eval.configs import against, plain
from lightx2v.eval.gate import Limits
from lightx2v.eval.layers import STEPS
from lightx2v.eval.metrics import Clip, load_lpips
from lightx2v.eval.pictures import Album
from lightx2v.eval.results import Result
from lightx2v.eval.text import summary

FAILED = 1
"""Exit code of an evaluation that does not keep its limits."""


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Make the same clips by two configurations and measure how far they are apart: of every clip, by"
        " step and by layer. Without a second one, a configuration that trades quality for time or memory is compared"
        " with the plain one. On tiny-wan, also count the clips that show what was asked for.",
    )
    files = parser.add_argument_group("configurations")
    files.add_argument("--config_json", metavar="FILE", help="JSON file of the settings that are tested")
    files.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="any setting; repeatable")
    files.add_argument("--against", metavar="FILE", help="JSON file of the settings that are the reference")
    _both(
        files,
        "set-against",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="a setting of the reference, over --against or, without it, over the tested settings; repeatable",
    )
    files.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        help="compare with the same settings in full precision and in full (default: where they differ)",
    )
    what = parser.add_argument_group("clips")
    what.add_argument("--suite", choices=("tiny-wan",), help="take the prompts for sentences of this model's world")
    what.add_argument(
        "--prompts", metavar="N|FILE", help=f"how many sentences to draw, or a prompt a line (tiny-wan: {COUNT})"
    )
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    what.add_argument("--seed", type=int, default=0, help="seed of the drawing of the sentences (default: %(default)s)")
    what.add_argument("--seeds", metavar="LIST", help="seeds of every prompt's noise, '0,1' or '0-3'")
    _both(
        what,
        "steps-of",
        type=int,
        default=DETAILS,
        metavar="N",
        help="measure the error by step and by layer of the first N clips (default: %(default)s)",
    )
    _both(
        what,
        "layer-steps",
        type=int,
        default=STEPS,
        metavar="N",
        help="look at the layers at N steps; 0: not (default: %(default)s)",
    )
    out = parser.add_argument_group("results")
    out.add_argument("--json", action="store_true", help="print JSON")
    out.add_argument("--html", metavar="FILE", help="write a page with frames, differences and plots")
    _both(out, "html-clips", type=int, default=4, metavar="N", help="the first and the worst N on it (default: 4)")
    out.add_argument("--save", metavar="DIR", help="write each wrong clip there, as a contact sheet")
    out.add_argument("--debug", action="store_true", help="log everything, and show tracebacks")
    gate = parser.add_argument_group("limits of the means: exit code 1 where one is not kept")
    _both(gate, "min-psnr", type=float, metavar="DB", help="PSNR")
    _both(gate, "min-ssim", type=float, metavar="X", help="SSIM")
    _both(gate, "max-lpips", type=float, metavar="X", help="LPIPS")
    _both(gate, "min-adherence", type=float, metavar="PERCENT", help="clips that show all that was asked for")
    _both(gate, "max-adherence-loss", type=float, metavar="POINTS", help="percent of them less than the reference")
    return parser


def _both(group: argparse._ArgumentGroup, name: str, **options: object) -> None:
    """A flag with dashes, and with underscores as most others have them."""
    group.add_argument(f"--{name}", f"--{name.replace('-', '_')}", **options)  # type: ignore[arg-type]


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits that the flags name. Raises ConfigError for what is no number."""
    limits = Limits(args.min_psnr, args.min_ssim, args.max_lpips, args.min_adherence, args.max_adherence_loss)
    for name, value in limits.named.items():
        if not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')}", f"{value}", allowed="a finite number")
    return limits


def reference_of(args: argparse.Namespace, config: Config, limits: Limits) -> Config | None:
    """What `config` is compared with; None where there is nothing to compare. Raises ConfigError."""
    named = args.against is not None or args.set_against
    if args.reference is False:
        if named or limits.need_reference:
            flag = "--against" if named else "the limit"
            raise ConfigError("--no-reference", f"is given, and {flag} needs a reference", do="remove one of them")
        return None
    if named:
        return against(config, args.against, args.set_against)
    whole = plain(config)
    return whole if args.reference or limits.need_reference or whole != config else None


def save_wrong(folder: Path) -> Callable[[Result, Clip], None]:
    """Writes the contact sheet of a clip that shows something else than asked; its metadata say what."""
    from lightx2v.io.media import write_result

    number = 0

    def save(result: Result, clip: Clip) -> None:
        nonlocal number
        if result.wrong:
            case = result.case
            saw = {name: str(getattr(result.found, name)) for name in result.wrong}
            words = [case.prompt.replace(" ", "_"), *(f"{name}-{value}" for name, value in saw.items())]
            metadata = {"prompt": case.prompt, "seed": str(case.seed), "saw": json.dumps(saw)}
            path = folder / f"{number:04d}_{'_'.join(words).replace(' ', '_')}.png"
            write_result(clip, str(path), FPS, metadata)
        number += 1

    return save


def main(argv: Sequence[str] | None = None, prog: str = "lightx2v eval") -> int:
    """Run, and print the report. Returns 0, or 1 where a limit is not kept."""
    args = build_parser(prog).parse_args(argv)
    for name in ("steps_of", "layer_steps", "html_clips"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name}", f"{getattr(args, name)}", allowed="0 or more")
    config, limits = load_config(args.config_json, {}, args.set), limits_of(args)
    reference = reference_of(args, config, limits)
    if limits.max_lpips is not None and (reason := load_lpips()[1]):
        raise ConfigError("--max-lpips", f"there is no LPIPS here: {reason}")
    cases = make_cases(
        config,
        given=args.prompt,
        prompts=args.prompts,
        seeds=args.seeds,
        seed=args.seed,
        world=args.suite is not None or (config.model_path is None),
    )
    album = Album(args.html_clips, args.html_clips)
    save = save_wrong(Path(args.save)) if args.save else None
    with tqdm(total=len(cases), desc="eval", unit="clip") as bar:

        def on_clip(result: Result, clip: Clip, other: Clip | None) -> None:
            bar.update()
            if args.html:
                album.add(result, clip, other)
            if save is not None:
                save(result, clip)

        found = compare(config, reference, cases, details=args.steps_of, layer_steps=args.layer_steps, on_clip=on_clip)
    head = {"suite": args.suite or "tiny-wan" if found.report.judged else None, "seed": args.seed}
    head |= {"mm_type": config.mm_config.mm_type, "plan": found.tested.plan.hash}
    if args.html:
        from lightx2v.eval.html.page import write_page

        write_page(args.html, found, *album.pages(), limits)
    if args.json:
        gate = {"gate": limits.to_json(found.report)} if limits.named else {}
        print(json.dumps(head | found.to_json() | gate, indent=2))
    else:
        print(", ".join(f"{name} {value}" for name, value in head.items() if value is not None))
        print(summary(found))
    failures = limits.failures(found.report)
    for line in failures:
        print(f"{prog}: {line}", file=sys.stderr)
    return FAILED if failures else 0
