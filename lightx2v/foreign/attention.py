"""The attention of a model that this package did not write, on one of our backends.

Every attention processor of diffusers ends in torch's scaled_dot_product_attention, whatever it does before: rotary
embedding, joint sequences, norms. That call alone is taken over, while the forward of the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightx2v.attention.base import ATTENTION, Backend
from lightx2v.attention.policy import AttentionPolicy, Slot, resolve_policy
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError, LightX2VError
from lightx2v.foreign.forward import Forward, wrapped_forward
from lightx2v.platform import DeviceInfo

_DISCARDED = -1000.0
"""What diffusers adds to a score that does not count is lower, -10000 or the lowest number of the dtype."""


_PLAIN = "torch_sdpa"
_SLOTS: tuple[Slot, ...] = ((0, "self"),)
"""All attention of a model is one to us: which call is which block's is not known."""


def plan_attention(config: Config, device: DeviceInfo, steps: int) -> AttentionPolicy:
    """The backend of each step. Raises ConfigError."""
    policy = resolve_policy(config.attention, device, _SLOTS, steps, config.dtype)
    for name, backend in policy.backends.items():
        if backend.for_grid is not None or backend.self_only:
            raise ConfigError("attention", f"'{name}' must know which tokens are the video's", do="name another one")
        if backend.for_module is not None:
            raise ConfigError(
                "attention",
                f"'{name}' reads scales of each attention, and which of a diffusers pipeline calls is not known",
                do="name one that finds its scales at each call, such as fa3_int8_ref",
            )
    return policy


class Routing(TorchFunctionMode):
    """Inside `with`, scaled_dot_product_attention is the backend of `policy` at the step that `step` gives.

    A call that the backend does not take is left to torch where `lenient`, and otherwise a LightX2VError: one with
    another dtype or width of the heads than it computes, or with a mask that differs between queries or heads. Causal
    attention and scores with a bias that is no mask are no backend's.
    """

    def __init__(self, policy: AttentionPolicy, step: Callable[[], int], lenient: bool) -> None:
        super().__init__()
        self.policy, self.lenient, self._step = policy, lenient, step
        self.taken = self.left = 0
        """Calls that the backend served, and that torch did."""

    @property
    def name(self) -> str:
        """The backend of this step."""
        return self.policy.at(min(self._step(), len(self.policy.by_step) - 1))[_SLOTS[0]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @torch.compiler.disable
    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        name, call = self.name, _Call(*args, **kwargs)
        if name == _PLAIN:
            return F.scaled_dot_product_attention(*args, **kwargs)
        mask, problem = _taken(ATTENTION[name], call)
        if problem is None:
            self.taken += 1
            k, v = call.key, call.value
            if call.enable_gqa:
                k, v = (each.repeat_interleave(call.query.shape[1] // k.shape[1], dim=1) for each in (k, v))
            q, k, v = (each.transpose(1, 2) for each in (call.query, k, v))
            return self.policy.functions[name](q, k, v, mask=mask, scale=call.scale).transpose(1, 2)
        if not self.lenient:
            raise LightX2VError(
                name,
                f"this attention backend does not take {problem}, which the model has",
                do="set attention.type to torch_sdpa, or attention.fallback to true",
            )
        self.left += 1
        return F.scaled_dot_product_attention(*args, **kwargs)


class _Call(NamedTuple):
    """The arguments of torch's function: query [B, H, L, D], key and value [B, H or groups, S, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def _taken(backend: Backend, call: _Call) -> tuple[Tensor | None, str | None]:
    """The mask as our backends have it, True where a query may look; or what the backend does not take of the call.

    Looking at a mask waits for the device.
    """
    query, mask = call.query, call.attn_mask
    dtype, widths = str(query.dtype).removeprefix("torch."), backend.head_dims
    if query.dim() != 4:
        return None, f"tensors of {query.dim()} dimensions"
    if call.is_causal:
        return None, "causal attention"
    if dtype not in backend.dtypes:
        return None, dtype
    if widths is not None and query.shape[-1] not in widths:
        return None, f"heads of width {query.shape[-1]}"
    if mask is None:
        return None, None
    if mask.is_floating_point():
        kept = mask > _DISCARDED
        if bool(mask[kept].any()):
            return None, "scores with a bias"
        mask = kept
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if bool(mask.all()):
        return None, None
    keys = mask[:, :1, :1]
    if mask.shape[1:3] == (1, 1) or bool((mask == keys).all()):
        return keys, None
    return (mask, None) if backend.masks else (None, "a mask that differs between queries or heads")


@contextmanager
def routed(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Inside the block the attention of `model` goes by `routing`; other models and code are not touched."""

    def wrap(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            with routing:
                return forward(*args, **kwargs)

        return run

    with wrapped_forward(model, wrap):
        yield
