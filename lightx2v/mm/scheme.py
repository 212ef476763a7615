"""The grammar of mm_type: a weight spec, an activation spec, and the libraries that compute with them. No torch here.

    W-<dtype>-<granularity>[-sym][-A-<dtype>-<granularity>[-group128][-sym][-dynamic][-outliers]]-<Library>[-Act<Library>]

Short names stand for long ones: int8, fp8, mxfp4, ... (any library that can), and int8-<library> and so on. An
activation granularity "channel" is LightX2V's word for one scale per token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from lightx2v.errors import ConfigError, suggestion
from lightx2v.quant.spec import (
    CODEBOOKS,
    FP4,
    FP4_DOUBLE,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TENSOR,
    FP8_TENSOR_DYNAMIC,
    FP8_TOKEN,
    GGUF,
    INT4_G64,
    INT4_G64_DYNAMIC,
    INT4_G128,
    INT8_CHANNEL,
    INT8_OUTLIERS,
    INT8_STATIC,
    INT8_STATIC_ASYM,
    INT8_STEPS,
    INT8_TOKEN,
    MXFP4,
    MXFP4_DYNAMIC,
    MXFP6,
    MXFP8,
    MXFP8_DYNAMIC,
    NF4,
    NF4_DOUBLE,
    NVFP4,
    NVFP4_DYNAMIC,
    Granularity,
    QSpec,
    gguf_kind,
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What an mm_type says. `name` is its canonical long form; `weight` is None when weights stay floating-point."""

    name: str
    weight: QSpec | None
    activation: QSpec | None
    library: str
    act_library: str

    @property
    def numerics(self) -> tuple[QSpec | None, QSpec | None]:
        """What two schemes have in common when they differ only in libraries."""
        return self.weight, self.activation

    @property
    def served(self) -> Scheme:
        """What a library is asked for: where scales come from makes no difference to a product of int8 codes."""
        if self.activation is None or not self.activation.is_calibrated:
            return self
        return replace(self, activation=INT8_TOKEN)

    def with_library(self, library: str) -> Scheme:
        """The same scheme computed by `library`. A named library's rounding of activations is kept."""
        act = _act_library(library) if self.act_library == "auto" else self.act_library
        moved = replace(self, library=library, act_library=act)
        return moved if self.weight is None else replace(moved, name=_long_name(moved))


#: Library -> how long and short names spell it; parsing ignores case and underscores and takes either spelling.
LIBRARY_TOKENS: dict[str, tuple[str, str]] = {
    "auto": ("Auto", "auto"),
    "torch_native": ("TorchNative", "torch"),
    "torch_scaled": ("TorchScaled", "torch-scaled"),
    "dequantize": ("Dequantize", "dequantize"),
    "reference": ("Reference", "reference"),
    "angelslim": ("AngelSlim", "angelslim"),
    "vllm": ("Vllm", "vllm"),
    "sgl": ("Sgl", "sgl"),
    "q8f": ("Q8F", "q8f"),
    "deepgemm": ("Deepgemm", "deepgemm"),
    "torchao": ("Torchao", "torchao"),
    "torchao_affine": ("TorchaoAffine", "torchao-affine"),
    "triton": ("Triton", "triton"),
    "onednn": ("Onednn", "onednn"),
    "outliers": ("Outliers", "outliers"),
    "marlin": ("Marlin", "marlin"),
    "lightx2v_kernel": ("Lightx2vKernel", "lightx2v-kernel"),
    "npu": ("Npu", "npu"),
    "tmo": ("Mlu", "tmo"),
    "musa": ("Musa", "musa"),
    "iluvatar": ("Iluvatar", "iluvatar"),
    "hygon_dcu": ("VllmHygonDcu", "vllm-hygon-dcu"),
    "intel_xpu": ("IntelXpu", "intel-xpu"),
}

#: Short name -> weight and activation. A longer name comes before one that begins it.
_SHORT: dict[str, tuple[QSpec, QSpec | None]] = {
    "int8-weight-only": (INT8_CHANNEL, None),
    "int8-static-asym": (INT8_CHANNEL, INT8_STATIC_ASYM),
    "int8-static": (INT8_CHANNEL, INT8_STATIC),
    "int8-timestep": (INT8_CHANNEL, INT8_STEPS),
    "int8": (INT8_CHANNEL, INT8_TOKEN),
    "llm-int8": (INT8_CHANNEL, INT8_OUTLIERS),
    "fp8-b128-weight-only": (FP8_BLOCK128, None),
    "fp8-b128": (FP8_BLOCK128, FP8_GROUP128),
    "fp8-pertensor-weight-only": (FP8_TENSOR, None),
    "fp8-pertensor-dynamic": (FP8_TENSOR, FP8_TENSOR_DYNAMIC),
    "fp8-pertensor": (FP8_TENSOR, FP8_TENSOR),
    "fp8-weight-only": (FP8_CHANNEL, None),
    "fp8": (FP8_CHANNEL, FP8_TOKEN),
    "mxfp8": (MXFP8, MXFP8_DYNAMIC),
    "mxfp6-mxfp8": (MXFP6, MXFP8_DYNAMIC),
    "mxfp4": (MXFP4, MXFP4_DYNAMIC),
    "nvfp4-split-n-workaround": (NVFP4, NVFP4_DYNAMIC),
    "nvfp4": (NVFP4, NVFP4_DYNAMIC),
    "nf4-double": (NF4_DOUBLE, None),
    "nf4": (NF4, None),
    "fp4-double": (FP4_DOUBLE, None),
    "fp4": (FP4, None),
    "int4-w4a4": (INT4_G64, INT4_G64_DYNAMIC),
    "int4-g128": (INT4_G128, None),
    **{f"gguf-{kind}": (spec, None) for kind, spec in GGUF.items()},
}
#: LightX2V's names of files that mix kinds of blocks -> the kind that most of their weights have.
_MIXED = {f"gguf-{kind}_{size}": f"gguf-{kind}" for kind in ("Q5_K", "Q4_K", "Q3_K") for size in ("M", "S")}

#: Integers of few bits in groups: int<bits>-g<size>[-asym], or int<bits>-channel[-asym].
_GROUPED = re.compile(r"int(?P<bits>[2348])-(?:g(?P<size>\d+)|channel)(?P<asym>-asym)?(?:-(?P<library>[a-z0-9-]+))?")

#: Names that the grammar does not cover -> the library, or what goes by the name of one.
_NAMED = {
    "Default": "torch",
    "Default-Force-FP32": "torch",
    "Calib": "calibration",
    "CalibMax": "calibration",
    "TensorParallel": "tensor_parallel",
}

#: Names of LightX2V's releases and this engine's own, besides the above; `known_names` adds their long forms.
_ALIASES = (
    *_SHORT,
    *(f"{kind}-{name}" for kind in ("int8", "fp8") for name in ("torch", "reference", "vllm", "sgl", "q8f", "torchao")),
    *(f"{kind}-{name}" for kind in ("int8", "fp8") for name in ("triton", "onednn")),
    *(f"fp8-b128-{name}" for name in ("torch", "reference", "deepgemm", "triton")),
    *(
        f"{kind}-{name}"
        for kind in ("fp8-pertensor", "mxfp8", "mxfp6-mxfp8", "mxfp4", "nvfp4")
        for name in ("torch", "dequantize", "reference")
    ),
    "fp8-pertensor-angelslim",
    *(f"int4-g128-{name}" for name in ("marlin", "dequantize", "reference")),
    *(f"int{bits}-g{size}{kind}" for bits in (4, 3, 2) for size in (128, 64) for kind in ("", "-asym")),
    *_MIXED,
    *"int8-npu int8-tmo fp8-musa int8-iluvatar int8-vllm-hygon-dcu fp8-intel-xpu".split(),
)
_OTHER_QUANTIZERS = (
    "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm-ActSgl",
    "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Sgl-ActVllm",
    "W-int8-channel-sym-A-int8-channel-sym-dynamic-Sgl-ActVllm",
    "W-fp8-block128-sym-A-fp8-channel-group128-sym-dynamic-Deepgemm-ActSgl",
)

#: Libraries whose rounding of activations is known, which is what "-Act<Library>" asks for.
_ACT_LIBRARIES = frozenset(
    "vllm sgl torchao torchao_affine triton deepgemm onednn torch_native reference angelslim".split()
)

_LONG = re.compile(
    r"W-(?P<w_dtype>[a-z0-9_]+)-(?P<w_gran>tensor|channel|block\d+|group\d+)(?P<w_sym>-sym)?"
    r"(?:-A-(?P<a_dtype>[a-z0-9]+)-(?P<a_gran>tensor|step|token|channel(?:-group\d+)?|group\d+)(?P<a_sym>-sym)?"
    r"(?P<dynamic>-dynamic)?(?P<outliers>-outliers)?)?"
    r"-(?P<library>[A-Za-z0-9_]+?)(?:-Act(?P<act>[A-Za-z0-9_]+))?"
)
_DTYPES = ("int8", "fp8", "int4", "int3", "int2", "nvfp4", "mxfp8", "mxfp6", "mxfp4", *CODEBOOKS)

_own: dict[str, Scheme] = {}


def declare(name: str) -> None:
    """Make `name`, the mm_type of a class registered from outside the package, parse (library "custom").

    Raises ConfigError when it already means something.
    """
    if name in _own or _parse(name) is not None:
        raise ConfigError("mm_type", f"'{name}' is taken", do="choose another name")
    _own[name] = Scheme(name, None, None, "custom", "custom")


def parse(name: str) -> Scheme:
    """The scheme that `name` says, in its long or a short form. Raises ConfigError with the closest known name."""
    scheme = known_scheme(name)
    if scheme is None:
        raise ConfigError(
            "mm_type",
            f"unknown mm_type '{name}'{suggestion(name, (*known_names(), *_own))}",
            allowed=f"Default, {', '.join(name for name in _SHORT if not name.startswith('gguf'))}, gguf-<kind>, "
            "<one of these>-<library>, or W-...-A-...-<Library>",
            do=f"libraries are {', '.join(short for _, short in LIBRARY_TOKENS.values())}",
        )
    return scheme


def known_scheme(name: str) -> Scheme | None:
    """As `parse`; None for a name that says nothing."""
    return _own.get(name) or _parse(name)


@lru_cache(maxsize=1)
def known_names() -> tuple[str, ...]:
    """Every name that LightX2V's releases use and the ones this engine adds, short and long."""
    long = (scheme.name for name in _ALIASES if (scheme := _parse(name)) is not None)
    return tuple(dict.fromkeys([*_NAMED, *_ALIASES, *long, *_OTHER_QUANTIZERS]))


@lru_cache(maxsize=256)
def _parse(name: str) -> Scheme | None:
    if name in _NAMED:
        return Scheme(name, None, None, _NAMED[name], _NAMED[name])
    for mixed, kind in _MIXED.items():
        if name == mixed or name.startswith(mixed + "-"):
            return _parse(kind + name.removeprefix(mixed))
    if (grouped := _GROUPED.fullmatch(name)) is not None:
        named = _library(grouped["library"]) if grouped["library"] else "auto"
        size = int(grouped["size"] or 0)
        granularity: Granularity = "group" if size else "channel"
        spec = QSpec(f"int{grouped['bits']}", granularity, size, symmetric=not grouped["asym"])
        return _scheme(spec, None, named, None) if named and _packs(spec) else None
    for prefix, (weight, activation) in _SHORT.items():
        if name == prefix or name.startswith(prefix + "-"):
            named = "auto" if name == prefix else _library(name[len(prefix) + 1 :])
            return _scheme(weight, activation, named, None) if named else None
    match = _LONG.fullmatch(name)
    if match is None or match["w_dtype"] not in _DTYPES or match["a_dtype"] not in (None, *_DTYPES):
        return None
    named, act = _library(match["library"]), _library(match["act"] or "")
    if named is None or (match["act"] and act not in _ACT_LIBRARIES):
        return None
    weight = _spec(match["w_dtype"], match["w_gran"], bool(match["w_sym"]), dynamic=False)
    if match["a_dtype"] is None:
        return _scheme(weight, None, named, act)
    of_tokens = match["a_gran"].removeprefix("channel-").replace("channel", "token")
    activation = _spec(match["a_dtype"], of_tokens, bool(match["a_sym"]), dynamic=bool(match["dynamic"]))
    if match["outliers"]:
        activation = replace(activation, outliers=INT8_OUTLIERS.outliers)
    return _scheme(weight, activation, named, act)


def _library(token: str) -> str | None:
    wanted = token.lower().replace("_", "")
    for library, spellings in LIBRARY_TOKENS.items():
        if wanted in (spelling.lower() for spelling in (*spellings, library.replace("_", ""))):
            return library
    return None


def _act_library(library: str) -> str:
    """Who quantizes the activations when the name does not say: Q8F leaves it to vLLM, others do it themselves."""
    return "vllm" if library == "q8f" else library


def _spec(dtype: str, granularity: str, symmetric: bool, dynamic: bool) -> QSpec:
    kind = granularity.rstrip("0123456789")
    # Only integers have a zero point: floating-point codes are symmetric whether the name says so or not.
    return QSpec(dtype, kind, int(granularity[len(kind) :] or 0), symmetric or not dtype.startswith("int"), dynamic)  # type: ignore[arg-type]


def _scheme(weight: QSpec, activation: QSpec | None, library: str, act: str | None) -> Scheme:
    if library == "torch_native" and activation is not None and _is_scaled(weight):
        library = "torch_scaled"  # torch's products of these are a library of their own here
    scheme = Scheme("", weight, activation, library, act or _act_library(library))
    return replace(scheme, name=_long_name(scheme))


def _packs(spec: QSpec) -> bool:
    """Whether whole groups fill whole bytes."""
    return not spec.size or (spec.size >= 16 and spec.filled(spec.size) == spec.size and spec.size % 8 == 0)


def _is_scaled(weight: QSpec) -> bool:
    return weight.dtype in ("mxfp8", "mxfp6", "mxfp4", "nvfp4") or weight == FP8_TENSOR


def _long_name(scheme: Scheme) -> str:
    def part(spec: QSpec, granularity: str) -> str:
        marks = {"-sym": spec.symmetric, "-dynamic": spec.dynamic, "-outliers": spec.outliers > 0}
        return f"{spec.dtype}-{granularity}" + "".join(mark for mark, has in marks.items() if has)

    assert scheme.weight is not None
    if (kind := gguf_kind(scheme.weight)) is not None:
        return f"gguf-{kind}" + ("" if scheme.library == "auto" else f"-{LIBRARY_TOKENS[scheme.library][0]}")
    words = [f"W-{part(scheme.weight, f'{scheme.weight.granularity}{scheme.weight.size or str()}')}"]
    if scheme.activation is not None:
        spelled = {
            "token": "channel",
            "group": f"channel-group{scheme.activation.size}",
            "tensor": "tensor",
            "step": "step",
        }
        words.append(f"A-{part(scheme.activation, spelled[scheme.activation.granularity])}")
    words.append(LIBRARY_TOKENS[scheme.library][0])
    if scheme.act_library != _act_library(scheme.library):
        words.append(f"Act{LIBRARY_TOKENS[scheme.act_library][0]}")
    return "-".join(words)
