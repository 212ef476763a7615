"""Attention backends by name. A model calls one function; which one it is, is decided once, by `select_attention`.

Shapes: B batch, L query tokens, S key tokens, H heads, Dh width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lightx2v.errors import ConfigError, LightX2VError, suggestion
from lightx2v.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from lightx2v.platform import DeviceInfo


class AttentionFn(Protocol):
    """Scaled dot-product attention: q [B, L, H, Dh] with k, v [B, S, H, Dh] gives [B, L, H, Dh] in q's dtype.

    `mask` is boolean and broadcasts to [B, H, L, S], True where a query may look; `scale` is Dh**-0.5 when None.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of attention."""

    fn: AttentionFn
    available: Callable[[DeviceInfo], str | None]
    """None where it can run; otherwise why it cannot."""
    dtypes: frozenset[str] = frozenset({"bfloat16", "float16", "float32"})


ATTENTION: Registry[Backend] = Registry("attention.type")
ATTENTION.add("flash_attn3", "lightx2v.attention.flash3:BACKEND")
ATTENTION.add("flash_attn2", "lightx2v.attention.flash2:BACKEND")
ATTENTION.add("cpu_flash", "lightx2v.attention.cpu_flash:BACKEND")
ATTENTION.add("torch_sdpa", "lightx2v.attention.sdpa:BACKEND", aliases=("sdpa",))

AUTO_ORDER = ("flash_attn3", "flash_attn2", "cpu_flash", "torch_sdpa")

NO_ADAPTER = (
    "flash_attn4",
    "sage_attn2",
    "sage_attn2_k_int8_v_fp8",
    "sage_attn3",
    "xformers",
    "flex",
    "flex_attn",
    "radial_attn",
    "sparge_attn",
    "spas_sage_attn2",
    "spas_sage_attn3",
    "spas_flash_attn4",
    "svg_attn",
    "svg2_attn",
    "sla_attn",
    "nbhd_attn",
    "draft_attn",
    "sol_attn",
    "dynamic_sparse_attn",
    "general_sparse_attn",
    "rainfusion_attn",
    "npu_flash_attn",
    "mlu_flash_attn",
    "mlu_sage_attn",
)
"""Names that LightX2V's configurations use and this version has no adapter for."""


def unavailable(name: str, device: DeviceInfo, dtype: str) -> str | None:
    """Why the backend `name` cannot run on `device` in `dtype`, or None when it can. Unknown names: ConfigError."""
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
    return backend.available(device)


def select_attention(
    name: str, device: DeviceInfo, fallback: bool = False, dtype: str = "bfloat16"
) -> tuple[AttentionFn, str, str]:
    """The backend to use: (function, its registered name, why it was chosen).

    `auto` takes the best that is available. A named backend that cannot run is a ConfigError that lists every reason,
    unless `fallback` permits another one.
    """
    reasons = {each: unavailable(each, device, dtype) for each in AUTO_ORDER}
    usable = [each for each in AUTO_ORDER if reasons[each] is None]
    missing = "; ".join(f"{each}: {reason}" for each, reason in reasons.items() if reason)
    if name == "auto":
        return ATTENTION[usable[0]].fn, usable[0], f"auto ({missing})" if missing else "auto"
    reason = unavailable(name, device, dtype)
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


def refuse_mask(name: str, mask: Tensor | None) -> None:
    """For a backend that has no masks: an error rather than a result that ignores one."""
    if mask is not None:
        raise LightX2VError(name, "this attention backend takes no mask", do="set attention.type to torch_sdpa")
