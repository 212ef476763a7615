"""Command line of the converter, with LightX2V's flags. Imports no torch before the work begins."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightx2v.convert.exports.registry import EXPORTS
from lightx2v.convert.options import FLOAT_DTYPES, LINEAR_DTYPES, LINEAR_TYPES, MODEL_TYPES, LoraOption, Options
from lightx2v.errors import ConfigError, LightX2VError, suggestion

if TYPE_CHECKING:
    from lightx2v.convert.run import Report

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Options) if field.default is not MISSING}


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    """An argparse type that takes one of `names` and suggests one for another word."""
    options = tuple(names)

    def check(word: str) -> str:
        if word not in options:
            raise argparse.ArgumentTypeError(
                f"unknown name '{word}'{suggestion(word, options)} (allowed: {', '.join(options)})"
            )
        return word

    return check


def _direction(word: str) -> str | None:
    return None if word == "None" else _one_of(("forward", "backward", "None"))(word)


def build_parser(prog: str = "lightx2v convert") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Quantize, rename, merge LoRAs into, and split or join the weights of Wan and FLUX.1 models.",
        allow_abbrev=False,
    )
    _file_flags(parser)
    _quantization_flags(parser)
    _lora_flags(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--device", help="where to compute: cpu, auto, or a device's name (default: %(default)s)")
    run.add_argument(
        "--parallel", action=argparse.BooleanOptionalAction, help="use every core (default); otherwise one"
    )
    run.add_argument("--verify", action="store_true", help="read the output back and compare it with the source")
    run.add_argument("--json", action="store_true", help="print the summary as JSON")
    run.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(**_DEFAULTS)
    return parser


def _file_flags(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("-s", "--source", type=Path, required=True, help="file of weights, or directory")
    files.add_argument("-o", "--output", type=Path, required=True, help="directory to write to")
    files.add_argument("-o_n", "--output_name", help="name of the output files (default: %(default)s)")
    files.add_argument(
        "-o_e", "--output_ext", type=_one_of((".safetensors", ".pth")), help=".safetensors (default) or .pth: one file"
    )
    files.add_argument(
        "-t", "--model_type", type=_one_of(MODEL_TYPES), help=f"{', '.join(MODEL_TYPES)} (default: %(default)s)"
    )
    files.add_argument(
        "-d",
        "--direction",
        type=_direction,
        help="layout of the output: forward = diffusers; backward, None = original (default)",
    )
    files.add_argument("-b", "--save_by_block", action="store_true", help="one file per block: block_N.safetensors")
    files.add_argument("--single_file", action="store_true", help="one file: <output_name>.safetensors")
    files.add_argument(
        "-c", "--chunk-size", type=int, help="tensors per file, <output_name>_partK.safetensors (default: %(default)s)"
    )
    files.add_argument(
        "--to",
        type=_one_of(EXPORTS),
        help=f"write a quantized source as files of another package, codes copied: {', '.join(EXPORTS)}",
    )
    files.add_argument("--ignore-keys", nargs="+", help="leave out tensors whose name contains one of these")
    files.add_argument("--copy_no_weight_files", action="store_true", help="copy the other files of the source too")


def _quantization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument("--quantized", action="store_true", help="quantize the linear layers of the blocks")
    group.add_argument("--linear_type", type=_one_of(LINEAR_TYPES), help=f"scheme: {', '.join(LINEAR_TYPES)}")
    group.add_argument("--linear_dtype", type=_one_of(LINEAR_DTYPES), help=f"older form: {', '.join(LINEAR_DTYPES)}")
    group.add_argument("--bits", type=int, help="bits of a code, where LightX2V's 8 does not say it")
    group.add_argument(
        "--comfyui_mode", action="store_true", help="fp8 with one scale for each weight, under ComfyUI's names"
    )
    group.add_argument(
        "--non_linear_dtype",
        type=_one_of(FLOAT_DTYPES),
        help="dtype of the other tensors (default: torch.float32 with --quantized, else the source's)",
    )
    group.add_argument("--key-idx", type=int, help="component of a name, from 0, that --target-keys are compared with")
    group.add_argument("--target-keys", nargs="+", help="quantize layers that have one of these there")
    group.add_argument("--ignore-quant-keys", nargs="+", help="do not quantize layers whose name contains one of these")


def _lora_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA, merged before quantizing")
    group.add_argument(
        "--lora_path", nargs="*", type=Path, default=[], help="files or directories, added in this order"
    )
    group.add_argument(
        "--lora_strength", nargs="*", type=float, default=[], help="of each, or one for all (default: 1)"
    )
    group.add_argument(
        "--lora_alpha", nargs="*", type=float, default=[], help="for files that hold no alpha (default: the rank)"
    )
    group.add_argument(
        "--lora_key_convert",
        type=_one_of(("auto", "same", "convert")),
        help="names in the LoRA: auto = of either layout, same = of the output's, convert = of the source's",
    )


def parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """As `parse_args`, and suggests a flag for an unknown one."""
    parser = build_parser(prog)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unknown argument '{unknown[0]}'{suggestion(unknown[0].partition('=')[0], flags)}")
    return arguments


def options_from(arguments: argparse.Namespace) -> Options:
    """The checked options. Raises ConfigError."""
    values = {name: getattr(arguments, name) for name in ("source", "output", *_DEFAULTS)}
    for name in ("target_keys", "ignore_keys", "ignore_quant_keys"):
        values[name] = tuple(values[name])
    return Options(**values | {"linear_type": _linear_type(arguments), "loras": _loras(arguments)})


def _linear_type(arguments: argparse.Namespace) -> str | None:
    named, older = arguments.linear_type, LINEAR_DTYPES.get(arguments.linear_dtype)
    if named and older and LINEAR_TYPES[named].dtype != LINEAR_TYPES[older].dtype:
        raise ConfigError(
            "--linear_type", f"{named} contradicts --linear_dtype {arguments.linear_dtype}", do="give one"
        )
    return named or older


def _loras(arguments: argparse.Namespace) -> tuple[LoraOption, ...]:
    paths = arguments.lora_path
    strengths = _spread("--lora_strength", arguments.lora_strength, len(paths), 1.0)
    alphas = _spread("--lora_alpha", arguments.lora_alpha, len(paths), None)
    return tuple(LoraOption(*values) for values in zip(paths, strengths, alphas, strict=True))


def _spread(flag: str, values: list[float], count: int, default: Any) -> list[Any]:
    if len(values) not in (0, 1, count) or (values and not count):
        raise ConfigError(flag, f"{len(values)} values for {count} LoRAs", allowed="one, or one for each --lora_path")
    return values if len(values) == count else (values or [default]) * count


def main(argv: Sequence[str] | None = None, prog: str = "lightx2v convert") -> int:
    """Run the converter.

    Returns 0, 2 for what the user can mend, 1 for a failure (--verify's included), or 130 when interrupted.
    """
    arguments = parse(argv, prog)
    try:
        options = options_from(arguments)
        if options.to is not None:
            from lightx2v.convert.exports.run import export

            report = export(options)
        else:
            from lightx2v.convert.run import convert

            report = convert(options)
    except LightX2VError as error:
        if arguments.debug:
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on with the file it was at", file=sys.stderr)
        return 130
    print(report.to_json() if arguments.json else _summary(report))
    if report.verified is False:
        print(f"{prog}: {_failure(report)}", file=sys.stderr)
        return 1
    return 0


def _summary(report: Report) -> str:
    kept = f", {report.files_kept} of them kept from an earlier run" if report.files_kept else ""
    dropped = f", {report.tensors_dropped} left out" if report.tensors_dropped else ""
    lines = [
        f"wrote {report.output} ({report.files} files{kept})",
        f"  quantized {report.layers_quantized} layers; {report.tensors_kept} other tensors{dropped}; "
        f"{report.loras} LoRAs",
        f"  {report.bytes_in:,} bytes to {report.bytes_out:,} bytes: {report.ratio:.3f} of the source",
        f"  {report.seconds:.1f} s, peak resident memory {report.peak_memory_bytes / 2**20:,.0f} MiB",
    ]
    if report.verified is not None:
        lines.append(
            f"  verified: {'all within bounds' if report.verified else 'FAILED'}; relative error of the worst:"
        )
        lines += [f"    {error.error:.3%} (at most {error.bound:.0%})  {error.name}" for error in report.worst]
    return "\n".join(lines)


def _failure(report: Report) -> str:
    bad = [error for error in report.worst if not error.good]
    return (
        f"--verify: {bad[0].name} has a relative error of {bad[0].error:.2%}, at most {bad[0].bound:.0%} is allowed\n"
        "  do: convert again when the file was damaged; leave a layer with outliers out with --ignore-quant-keys, "
        "or use --linear_type fp8"
    )
