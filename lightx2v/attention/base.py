"""Attention backends by name. A model calls one function; which one it is, is decided before loading.

Shapes: B batch, L query tokens, S key tokens, H heads, Dh width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from lightx2v.errors import ConfigError, suggestion
from lightx2v.platform import install_hint, probe
from lightx2v.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from lightx2v.platform import DeviceInfo
    from lightx2v.vendor import Function

Part = Literal["self", "cross", "image"]
"""Attention of a block to the tokens themselves (and to the text, where both are one sequence), to the text, or to
the tokens of an image."""

Grid = tuple[int, int, int]
"""Frames, height and width of the video tokens."""

HALVES = frozenset({"bfloat16", "float16"})


class AttentionFn(Protocol):
    """Scaled dot-product attention: q [B, L, H, Dh] with k, v [B, S, H, Dh] gives [B, L, H, Dh] in q's dtype.

    `mask` is boolean and broadcasts to [B, H, L, S], True where a query may look; `scale` is Dh**-0.5 when None. Every
    backend takes a mask of keys, [B, 1, 1, S]; only some take one that differs between queries or heads. A mask is not
    changed after its first use: a new one is made instead.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor: ...


def nothing(device: DeviceInfo) -> str | None:
    """For `Backend.needs` and `Backend.missing`."""
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of attention."""

    fn: AttentionFn
    needs: Callable[[DeviceInfo], str | None] = nothing
    """The device that it needs, where this one cannot run it."""
    function: Function | None = None
    """What it calls of an optional package."""
    minimum: tuple[int, ...] = ()
    """The oldest version of that package that will do."""
    missing: Callable[[DeviceInfo], str | None] = nothing
    """What it lacks on a device that it could run on, where it calls no optional package."""
    dtypes: frozenset[str] = frozenset({"bfloat16", "float16", "float32"})
    head_dims: Collection[int] | None = None
    """Widths of a head that it takes; None for all."""
    masks: bool = False
    """Whether it takes masks that differ between queries or heads."""
    exact: bool = True
    """Whether it computes the definition up to rounding; 8-bit and sparse ones do not, and `auto` never takes them."""
    self_only: bool = False
    """Whether it is made for attention of video tokens to themselves alone."""
    min_tokens: int = 1
    """Fewest query tokens that it takes."""
    for_grid: Callable[[Grid], AttentionFn] | None = None
    """The function for video tokens on a grid, where the backend must know it; `fn` raises then."""
    for_module: Callable[[Any, str], AttentionFn] | None = None
    """The function of one attention, by the module and attribute that hold it, where the backend computes with scales
    that the checkpoint has for it (`attention.scales`); `fn` raises then."""
    repository: str | None = None
    """Where its kernel is downloaded from, on first use."""
    load: Callable[[], object] | None = None
    """Fetches that kernel, so that a failure shows before the weights are read."""

    def available(self, device: DeviceInfo) -> str | None:
        """None where it can run; otherwise why it cannot, and what to do about it."""
        needs = self.needs(device)
        if needs:
            return f"needs {needs}, the device is {device.name}"
        if self.function is None:
            return self.missing(device)
        package = self.function.module
        version = probe(package).version
        if version is not None and too_old(version, self.minimum):
            wanted = ".".join(map(str, self.minimum))
            return f"{package} {version} is too old, {wanted} or newer is needed ({install_hint(package)})"
        return self.function.find().reason


class Needs(NamedTuple):
    """What a run asks of its backends, beside the dtype; None where it is not known."""

    head_dim: int | None = None
    tokens: int | None = None
    """Video or image tokens of one sequence."""
    masks: bool = False
    """Whether the model has masks that differ between queries or heads."""
    part: Part = "self"
    allow_download: bool = False


ANYTHING = Needs()

ATTENTION: Registry[Backend] = Registry("attention.type")
ATTENTION.add("flash_attn3", "lightx2v.attention.flash3:BACKEND")
ATTENTION.add("flash_attn3_fp8", "lightx2v.attention.flash3:FP8")
ATTENTION.add("flash_attn4", "lightx2v.attention.flash4:BACKEND")
ATTENTION.add("flash_attn2", "lightx2v.attention.flash2:BACKEND")
ATTENTION.add("sage_attn2", "lightx2v.attention.sage:SAGE2")
ATTENTION.add("sage_attn2_k_int8_v_fp8", "lightx2v.attention.sage:SAGE2_FP8")
ATTENTION.add("sage_attn3", "lightx2v.attention.sage:SAGE3")
ATTENTION.add("triton_8bit", "lightx2v.attention.triton:EIGHT")
ATTENTION.add("triton_8bit_fp16", "lightx2v.attention.triton:HALF")
ATTENTION.add("xformers", "lightx2v.attention.xformers:BACKEND")
ATTENTION.add("flex", "lightx2v.attention.flex:BACKEND", aliases=("flex_attn",))
ATTENTION.add("radial_attn", "lightx2v.attention.radial:BACKEND")
ATTENTION.add("sparge_attn", "lightx2v.attention.sparge:SPARGE")
ATTENTION.add("spas_sage_attn2", "lightx2v.attention.sparge:BLOCKS")
ATTENTION.add("flash_attn2_hub", "lightx2v.attention.hub:FLASH2")
ATTENTION.add("flash_attn3_hub", "lightx2v.attention.hub:FLASH3")
ATTENTION.add("flash_attn4_hub", "lightx2v.attention.hub:FLASH4")
ATTENTION.add("sage_attn2_hub", "lightx2v.attention.hub:SAGE2")
ATTENTION.add("cpu_flash", "lightx2v.attention.cpu_flash:BACKEND")
ATTENTION.add("torch_sdpa", "lightx2v.attention.sdpa:BACKEND", aliases=("sdpa",))
ATTENTION.add("torch_sdpa_flash", "lightx2v.attention.sdpa:FLASH")
ATTENTION.add("torch_sdpa_cudnn", "lightx2v.attention.sdpa:CUDNN")
ATTENTION.add("torch_sdpa_efficient", "lightx2v.attention.sdpa:EFFICIENT")
ATTENTION.add("torch_sdpa_math", "lightx2v.attention.sdpa:MATH")
ATTENTION.add("sage_ref_int8_fp8", "lightx2v.attention.quantized:INT8_FP8")
ATTENTION.add("sage_ref_int8_fp16", "lightx2v.attention.quantized:INT8_FP16")
ATTENTION.add("sage_ref_int8_fp8_unsmoothed", "lightx2v.attention.quantized:INT8_FP8_UNSMOOTHED")
ATTENTION.add("fp8_block_ref", "lightx2v.attention.quantized:FP8_BLOCK")
ATTENTION.add("fp8_block_ref_unsmoothed", "lightx2v.attention.quantized:FP8_BLOCK_UNSMOOTHED")
ATTENTION.add("fp8_ref", "lightx2v.attention.quantized:FP8_HEAD")
ATTENTION.add("fp8_ref_unsmoothed", "lightx2v.attention.quantized:FP8_HEAD_UNSMOOTHED")
ATTENTION.add("fa3_int8_static_ref", "lightx2v.attention.fa3:INT8_STATIC")
ATTENTION.add("fa3_int8_ref", "lightx2v.attention.fa3:INT8")
ATTENTION.add("fa3_int8_ref_unsmoothed", "lightx2v.attention.fa3:INT8_UNSMOOTHED")
ATTENTION.add("fa3_int8_ref_rotated", "lightx2v.attention.fa3:INT8_ROTATED")
ATTENTION.add("fa3_int8_ref_rotated_unsmoothed", "lightx2v.attention.fa3:INT8_ROTATED_UNSMOOTHED")
ATTENTION.add("fa3_fp8_ref", "lightx2v.attention.fa3:FP8")
ATTENTION.add("fa3_fp8_ref_unsmoothed", "lightx2v.attention.fa3:FP8_UNSMOOTHED")
ATTENTION.add("fa3_fp8_ref_rotated", "lightx2v.attention.fa3:FP8_ROTATED")
ATTENTION.add("fa3_fp8_ref_rotated_unsmoothed", "lightx2v.attention.fa3:FP8_ROTATED_UNSMOOTHED")
ATTENTION.add("fa3_mxfp4_ref", "lightx2v.attention.fa3:MXFP4")
ATTENTION.add("fa3_mxfp4_ref_unsmoothed", "lightx2v.attention.fa3:MXFP4_UNSMOOTHED")
ATTENTION.add("fa3_mxfp4_ref_rotated", "lightx2v.attention.fa3:MXFP4_ROTATED")
ATTENTION.add("fa3_mxfp4_ref_rotated_unsmoothed", "lightx2v.attention.fa3:MXFP4_ROTATED_UNSMOOTHED")

AUTO_ORDER = ("flash_attn3", "flash_attn4", "flash_attn2", "cpu_flash", "torch_sdpa")

NO_ADAPTER = (
    "spas_sage_attn3",
    "spas_flash_attn4",
    "svg_attn",
    "svg2_attn",
    "sla_attn",
    "nbhd_attn",
    "nbhd_attn_flashinfer",
    "draft_attn",
    "sol_attn",
    "dynamic_sparse_attn",
    "general_sparse_attn",
    "rainfusion_attn",
    "aiter_attn",
    "intel_xpu_flash_attn",
    "intel_xpu_cute_attn",
    "metax_sage_attn2",
    "flash_attn_hygon_dcu",
    "flash_attn_enflame_gcu",
    "iluvatar_flash_attn",
    "npu_flash_attn",
    "mlu_flash_attn",
    "mlu_sage_attn",
)
"""Names that LightX2V's configurations use for kernels of its own and of other vendors' devices."""


def unavailable(name: str, device: DeviceInfo, dtype: str, needs: Needs = ANYTHING) -> str | None:
    """Why the backend `name` cannot do what a run needs on `device`; None when it can. Unknown names: ConfigError."""
    if name in NO_ADAPTER:
        return "no adapter in this version"
    if name not in ATTENTION:
        known = [*ATTENTION, *NO_ADAPTER]
        raise ConfigError(
            ATTENTION.kind, f"unknown name '{name}'{suggestion(name, known)}", allowed=", ".join(["auto", *ATTENTION])
        )
    backend = ATTENTION[name]
    if dtype not in backend.dtypes:
        return f"computes in {' or '.join(sorted(backend.dtypes))} only, the run is in {dtype}"
    if needs.head_dim is not None and backend.head_dims is not None and needs.head_dim not in backend.head_dims:
        return f"takes heads of width {_widths(backend.head_dims)}, the model's have {needs.head_dim}"
    if needs.masks and not backend.masks:
        return "takes no mask that differs between queries or heads, and the model has one"
    if needs.part != "self" and backend.self_only:
        return "is made for the attention of video tokens to themselves"
    if needs.tokens is not None and needs.part == "self" and needs.tokens < backend.min_tokens:
        return f"takes at least {backend.min_tokens} tokens, the run has {needs.tokens}"
    if backend.repository is not None and not needs.allow_download:
        return f"downloads {backend.repository}, and attention.allow_download is false"
    return backend.available(device)


def select_attention(
    name: str, device: DeviceInfo, fallback: bool = False, dtype: str = "bfloat16", needs: Needs = ANYTHING
) -> tuple[AttentionFn, str, str]:
    """The backend to use: (function, its registered name, why it was chosen).

    `auto` takes the best that is available and exact. A named backend that cannot run is a ConfigError that lists every
    reason, unless `fallback` permits another one.
    """
    reasons = {each: unavailable(each, device, dtype, needs) for each in AUTO_ORDER}
    usable = [each for each in AUTO_ORDER if reasons[each] is None]
    missing = "; ".join(f"{each}: {reason}" for each, reason in reasons.items() if reason)
    if name == "auto":
        return ATTENTION[usable[0]].fn, usable[0], f"auto ({missing})" if missing else "auto"
    reason = unavailable(name, device, dtype, needs)
    if reason is None:
        name = ATTENTION.canonical(name)
        return ATTENTION[name].fn, name, "named"
    if fallback:
        return ATTENTION[usable[0]].fn, usable[0], f"fallback from {name}: {reason}"
    raise ConfigError(
        ATTENTION.kind,
        f"'{name}' cannot run on {device.torch_name}: {reason}",
        allowed=f"{', '.join(['auto', *usable])}{f' ({missing})' if missing else ''}",
        do="name one of these, or set attention.fallback to true",
    )


def too_old(version: str, minimum: tuple[int, ...]) -> bool:
    """Whether `version` is below `minimum`; one that does not start with a number is taken to be new."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return found is not None and tuple(map(int, found[0].split("."))) < minimum


def _widths(allowed: Collection[int]) -> str:
    if isinstance(allowed, range):
        return f"{allowed[0]} to {allowed[-1]} in steps of {allowed.step}"
    return " or ".join(map(str, allowed))
