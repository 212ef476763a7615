"""The scales under which an attention's queries, keys and values become int8: a calibration's, held by the checkpoint.

They lie beside the tensors of the module that calls the attention, such as `blocks.0.self_attn`, for its H heads:

    <module>.attn_scales.q  .k  .v      float32 [H]: value = code * scale
    <module>.attn_scales.rotation       int32 []: the size of the rotation of queries and keys; 0: there is none
    <module>.attn_scales.smoothed       int32 []: 1 where the keys' mean over the tokens was taken away, else 0

`image_attn_scales` are those of the attention to image tokens, in a module that has two. The last two may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightx2v.attention.base import AttentionFn
from lightx2v.attention.kernel import as_operator, without_masked
from lightx2v.errors import CheckpointError, LightX2VError

SCALES = ("q", "k", "v")
LEAVES = (*SCALES, "rotation", "smoothed")
_CALIBRATE = "calibrate first: attention scales come from lightx2v calibrate"


class Part(Protocol):
    """One attention of a model, as in `attention.policy.ModelPart`."""

    @property
    def module(self) -> Any: ...
    @property
    def name(self) -> str: ...


def child_of(name: str) -> str:
    """The child that holds the scales of the attention that a module calls by attribute `name`."""
    return f"{name.removesuffix('attention')}attn_scales"


class HeadScales(nn.Module):
    """The scales of one attention; filled by `load_tensor` and `finish`, as `io.weights.stream_into` does."""

    q: Tensor
    k: Tensor
    v: Tensor

    def __init__(self, heads: int, head_dim: int, where: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.where = heads, head_dim, where
        self.rotation, self.smoothed = 0, False
        self.function: AttentionFn | None = None
        """What computes with these scales; made on first use."""

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        """Take one of `LEAVES`. Raises CheckpointError for another name and for what does not fit the model."""
        if leaf not in LEAVES:
            raise CheckpointError(self.where, f"tensor '{leaf}' is not part of it", allowed=", ".join(LEAVES))
        if leaf in SCALES:
            if tensor.shape != (self.heads,) or not tensor.is_floating_point() or not bool((tensor > 0).all()):
                got = f"'{leaf}' {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                raise CheckpointError(self.where, got, allowed=f"positive floats, [{self.heads}]")
            self.register_buffer(leaf, tensor.float().contiguous())
            return
        value = int(tensor)
        if leaf == "smoothed":
            self.smoothed = bool(value)
        elif value < 0 or value & (value - 1) or (value and self.head_dim % value):
            raise CheckpointError(
                self.where, f"'rotation' is {value}", allowed=f"0, or a power of two that divides {self.head_dim}"
            )
        else:
            self.rotation = value

    def finish(self) -> None:
        """Raise CheckpointError that names what did not arrive."""
        if missing := [leaf for leaf in SCALES if leaf not in self._buffers]:
            raise CheckpointError(self.where, f"missing: {', '.join(missing)}", do=_CALIBRATE)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for leaf, tensor in scale_tensors(self._buffers, self.rotation, self.smoothed).items():
            destination[prefix + leaf] = tensor


def hold_scales(model: nn.Module, parts: Iterable[Part], names: Iterable[str], heads: int, head_dim: int) -> None:
    """Make room in `model` for the scales among the tensors `names` of a checkpoint, whoever computes the attention.

    `parts` are the attentions of `model`, with `heads` heads of width `head_dim`.
    """
    there = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in LEAVES}
    for module, name in named_parts(model, parts):
        child = child_of(name)
        if (full := f"{module}.{child}") in there:
            model.get_submodule(module).add_module(child, HeadScales(heads, head_dim, full))


def named_parts(model: nn.Module, parts: Iterable[Part]) -> list[tuple[str, str]]:
    """For each of `parts` the full name of its module in `model`, and the attribute that holds its function."""
    names = {module: name for name, module in model.named_modules()}
    return [(names[part.module], part.name) for part in parts]


def check_scales(where: str, needed: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], heads: int) -> None:
    """Raise CheckpointError where the checkpoint `where` lacks the scales of an attention.

    `needed` has the backend of each attention that reads them, by the full name of what holds them; `shapes` are those
    of all tensors of the checkpoint, by the model's names.
    """
    for holder, backend in needed.items():
        for leaf in SCALES:
            name = f"{holder}.{leaf}"
            if name not in shapes:
                raise CheckpointError(
                    where,
                    f"'{name}' is missing, attention backend '{backend}' reads the scales of heads from it",
                    do=f"{_CALIBRATE}; or name a backend that finds them at each call, such as fa3_int8_ref",
                )
            if shapes[name] != (heads,):
                raise CheckpointError(where, f"'{name}' has shape {list(shapes[name])}, wanted is [{heads}]")


class StaticAttention:
    """`run` with the scales of one attention; an `AttentionFn`."""

    def __init__(self, name: str, run: Callable[..., Tensor], scales: HeadScales) -> None:
        self.name, self.run, self.scales = name, run, scales

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        held = self.scales

        def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return self.run(q, k, v, scale, held.q, held.k, held.v, held.rotation, held.smoothed)

        return without_masked(self.name, run, q, k, v, mask, scale)


def static_attention(name: str, kernel: Callable[..., Tensor]) -> Callable[[Any, str], AttentionFn]:
    """`Backend.for_module` of backend `name`, whose kernel takes what `StaticAttention` gives it."""
    run = as_operator(name, kernel)

    def for_module(module: Any, attribute: str) -> AttentionFn:
        scales = getattr(module, child_of(attribute), None)
        if scales is None:
            raise LightX2VError(name, "the checkpoint has no scales for this attention", do=_CALIBRATE)
        if scales.function is None:
            scales.function = StaticAttention(name, run, scales)
        function: AttentionFn = scales.function
        return function

    return for_module


def no_scales(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """For `Backend.fn` of a backend with `for_module`."""
    raise LightX2VError("attention.type", "the scales of heads are not known where it was called", do=_CALIBRATE)


def scale_tensors(scales: Mapping[str, Tensor | None], rotation: int, smoothed: bool) -> dict[str, Tensor]:
    """The tensors, by leaf, of one attention: `scales` [H] of q, k and v, and what they hold for."""
    flags = {"rotation": rotation, "smoothed": int(smoothed)}
    found = {leaf: scale.float() for leaf in SCALES if (scale := scales.get(leaf)) is not None}
    return found | {leaf: torch.tensor(value, dtype=torch.int32) for leaf, value in flags.items()}
