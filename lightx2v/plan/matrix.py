"""Every feature that a run can have, as data: which of them go together, and what each costs in accuracy.

`plan.matrix_page` writes docs/features.md; tests/e2e/test_matrix.py runs every pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.models.spec import FAMILIES
from lightx2v.plan.conflicts import check_together
from lightx2v.plan.features import plan_cache
from lightx2v.plan.resolve import EMBEDDED
from lightx2v.plan.sampling import plan_sampler
from lightx2v.request import build_request

Settings = Mapping[str, Any]
"""By dotted key."""

_PLAIN: Settings = {
    "device": "cpu",
    "dtype": "float32",
    "prompt": "a red circle",
    "attention.type": "torch_sdpa",
    "sampling.steps": 8,
    "sampling.cfg": True,
}
RUNS: Mapping[str, Settings] = {
    "wan2.1": {
        **_PLAIN,
        **{"video.height": 32, "video.width": 48, "video.frames": 5},
        "sampling.guidance": 2.0,
    },
    "flux": {
        **_PLAIN,
        **{"model_cls": "flux", "task": "t2i", "video.height": 64, "video.width": 96},
        "sampling.true_guidance": 2.0,
    },
}
"""By family: the plain run, with guidance, that every other one is compared with."""


@dataclass(frozen=True)
class Value:
    """One feature in one form."""

    name: str
    settings: Settings
    errors: Mapping[str, float] = field(default_factory=dict)
    """By family, the largest root mean square of what it changes in the latents of the plain run, over that of the
    latents; none: no bit changes. Twice what was measured, or so."""
    redefines: bool = False
    """Whether it asks for another result rather than for the same one in another way."""


@dataclass(frozen=True)
class Axis:
    """Forms of one feature, of which a run has one."""

    name: str
    values: tuple[Value, ...]
    only_with: str | None = None
    """The axis without which it means nothing."""


def _approximate(name: str, wan: float, flux: float, **settings: Any) -> Value:
    return Value(name, _dotted(settings), dict(zip(RUNS, (wan, flux), strict=True)))


def _exact(name: str, **settings: Any) -> Value:
    return Value(name, _dotted(settings))


def _other(name: str, **settings: Any) -> Value:
    return Value(name, _dotted(settings), redefines=True)


def _dotted(settings: Settings) -> Settings:
    return {key.replace("__", "."): value for key, value in settings.items()}


def _quantized(mm_type: str, wan: float, flux: float) -> Value:
    return _approximate(mm_type, wan, flux, mm_config__mm_type=mm_type, mm_config__weight_auto_quant=True)


def _cache(method: str, wan: float, flux: float, **options: Any) -> Value:
    return _approximate(method, wan, flux, cache__type=method, **{f"cache__{key}": v for key, v in options.items()})


def _offload(name: str, **options: Any) -> Value:
    return _exact(name, offload__enabled=True, **{f"offload__{key}": v for key, v in options.items()})


def _lora(name: str, dynamic: bool) -> Value:
    return _approximate(name, 1e-5, 1e-5, lora=({"path": "lora.safetensors", "strength": 0.8},), lora_dynamic=dynamic)


_EIGHT_BITS = "sage_ref_int8_fp8"
_RULES = (
    {"type": _EIGHT_BITS, "steps": "2:", "layers": "1:"},
    {"type": "torch_sdpa", "layers": "-1", "part": "self"},
)
_POLYNOMIAL = (1.0, 0.0)
_STEP_LIST = (1000, 900, 800, 650, 450, 250)

AXES: tuple[Axis, ...] = (
    Axis(
        "mm_type",
        (
            _approximate("Default-Force-FP32", 1e-5, 1e-5, mm_config__mm_type="Default-Force-FP32"),
            _quantized("int8", 0.055, 0.006),
            _quantized("fp8", 0.08, 0.02),
            _quantized("fp8-b128", 0.06, 0.022),
            _quantized("mxfp8", 0.08, 0.022),
            _quantized("int4-g128", 0.2, 0.07),
            _quantized("nf4", 0.15, 0.06),
            _quantized("llm-int8", 0.03, 0.006),
            _quantized("int4-w4a4", 0.33, 0.1),
            _quantized("gguf-Q8_0", 0.007, 0.0035),
        ),
    ),
    Axis(
        "cache",
        (
            _cache("teacache", 0.1, 0.055, threshold=0.3, coefficients=_POLYNOMIAL),
            _cache("custom", 0.1, 0.055, threshold=0.3, coefficients=_POLYNOMIAL),
            _cache("magcache", 0.38, 0.045, threshold=0.1, ratios=(1.0, *[0.95] * 7)),
            _cache("taylorseer", 0.36, 0.045, interval=2, order=1),
            _cache("fbcache", 0.12, 0.042, threshold=0.3),
            _cache("dbcache", 0.085, 0.037, threshold=0.3, first_blocks=1, last_blocks=1, warmup=2, taylor=True),
            _cache("adacache", 0.3, 0.06),
            _cache("easycache", 0.24, 0.066, threshold=0.2, warmup=2),
            _cache("fora", 0.33, 0.025, interval=2),
            _cache("pab", 0.23, 0.02, interval=2),
        ),
    ),
    Axis("cache.store", (_approximate("kept in fp8", 0.03, 0.008, cache__store="fp8"),), only_with="cache"),
    Axis("cache.cfg_gate", (_approximate("cfg_gate", 0.24, 0.02, cache__cfg_gate=0.75),)),
    Axis(
        "offload",
        (
            _offload("model", granularity="model"),
            _offload("block", granularity="block"),
            _offload("phase", granularity="phase"),
            _offload("block, lazy_load", granularity="block", lazy_load=True),
            _offload("phase, lazy_load", granularity="phase", lazy_load=True),
            _offload("block, ratio 0.5", granularity="block", ratio=0.5),
        ),
    ),
    Axis("lora", (_lora("merged", False), _lora("branch", True))),
    Axis(
        "attention",
        (
            _approximate("8 bits", 0.026, 0.0028, attention__type=_EIGHT_BITS),
            _approximate("rules", 0.02, 0.002, attention__rules=_RULES),
        ),
    ),
    Axis("compile", (_approximate("compile", 1e-5, 1e-5, compile=True),)),
    Axis("graphs", (_exact("graphs", graphs=True),)),
    Axis(
        "solver",
        (
            _other("unipc", sampling__solver="unipc"),
            _other("euler", sampling__solver="euler"),
            _other("dpm++", sampling__solver="dpm++"),
        ),
    ),
    Axis(
        "steps",
        (_other("step list", sampling__denoising_step_list=(1000, 900, 800, 650, 450, 250), sampling__steps=None),),
    ),
    Axis("resolution", (_other("changing", sampling__changing_resolution=True),)),
    Axis("cfg_schedule", (_other("cfg_schedule", sampling__cfg_schedule="1:7"),)),
    Axis("unload_modules", (_exact("unload_modules", unload_modules=True),)),
    Axis("vae", (_exact("tiling", vae__tiling=True),)),
)

Pair = tuple[Value, Value]


def axis_of(value: Value) -> Axis:
    """The axis that `value` is on."""
    return next(axis for axis in AXES if value in axis.values)


def goes_with(first: Axis, second: Axis) -> bool:
    """Whether forms of both mean something together."""
    return first.only_with in (None, second.name) and second.only_with in (None, first.name)


def pairs() -> Iterator[Pair]:
    """Every two values of different axes, that mean something together."""
    for number, first in enumerate(AXES):
        for second in AXES[number + 1 :]:
            if goes_with(first, second):
                yield from ((one, other) for one in first.values for other in second.values)


def settings(family: str, *values: Value) -> dict[str, Any]:
    """Those of a run of `family` with `values`."""
    merged = dict(RUNS[family])
    for value in values:
        merged |= value.settings
    return merged


@lru_cache(maxsize=len(RUNS))
def _subject(family: str) -> tuple[Any, Any]:
    """A model of `family` on meta, and what stands for its files."""
    spec = FAMILIES[family]
    if family == "wan2.1":
        files = spec.detect(EMBEDDED, "t2v")
    else:
        from lightx2v.models.flux.arch import FluxArch

        files = SimpleNamespace(arch=FluxArch(num_layers=2, num_single_layers=3), variant="dev", scheduler=None)
    with torch.device("meta"):
        return spec.build_dit(files.arch), files


def refusal(family: str, *values: Value) -> ConfigError | None:
    """Why a run with `values` is refused, whatever the device and the checkpoint; None where it is not."""
    config: Config = load_config(None, settings(family, *values))
    spec = FAMILIES[family]
    module, files = _subject(family)
    request = build_request(config, asdict(spec.defaults[config.task]), spec.embedded_guidance)
    try:
        check_together(config)
        plan_sampler(config, spec, files, request)
        plan_cache(module, config, spec, files, request)
    except ConfigError as error:
        return error
    return None
