"""Scales of activations, found while a model runs on samples."""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightx2v.errors import ConfigError
from lightx2v.integrations.quanto.fake import LEVELS

if TYPE_CHECKING:
    from lightx2v.integrations.quanto.modules import QuantizedModule

_ACTIVE: ContextVar[Calibration | None] = ContextVar("calibration", default=None)
_SCALE = "quanto_scale"
"""Attribute of a result that is quantized: its scale, which the next layer adopts."""


def active() -> Calibration | None:
    """The calibration that is under way."""
    return None if torch.compiler.is_compiling() else _ACTIVE.get()


class Calibration:
    """`with Calibration(): model(samples)` finds the scales of inputs and results of every quantized layer.

    scale = largest absolute value / 127 or 448, averaged over calls: `momentum` * old + (1 - momentum) * new, the first
    as it is. A layer that takes the quantized result of another one adopts its scale. `streamline`: results are not
    quantized, only inputs are, so that no sum or norm is given rounded values that it need not have.
    """

    def __init__(self, momentum: float = 0.9, streamline: bool = True) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError("momentum", f"is {momentum}", allowed="0 to less than 1")
        self.momentum, self.streamline = momentum, streamline
        self._seen: dict[int, QuantizedModule] = {}
        self._token: Token[Calibration | None] | None = None

    def __enter__(self) -> Calibration:
        self._token = _ACTIVE.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        assert self._token is not None
        _ACTIVE.reset(self._token)
        for module in self._seen.values():
            module.rescaled()

    @torch.no_grad()
    def see_input(self, module: QuantizedModule, x: Tensor) -> None:
        """Update the scale of the module's input."""
        self._seen[id(module)] = module
        adopted: Tensor | None = getattr(x, _SCALE, None)
        if adopted is not None:
            module.input_scale.copy_(adopted)
        else:
            self._update(module, module.input_scale, x)

    @torch.no_grad()
    def see_output(self, module: QuantizedModule, y: Tensor) -> None:
        """Update the scale of the module's result."""
        self._update(module, module.output_scale, y)
        if self.streamline:
            module.quantizes_output = False

    def mark(self, module: QuantizedModule, y: Tensor) -> Tensor:
        """The result with its scale."""
        setattr(y, _SCALE, module.output_scale.detach().clone())
        return y

    def _update(self, module: QuantizedModule, scale: Tensor, values: Tensor) -> None:
        assert module.activations is not None
        new = (values.detach().abs().amax().float() / LEVELS[module.activations.dtype]).to(scale.dtype)
        if float(new) == 0:
            return  # nothing but zeros says nothing of the range
        scale.copy_(new if float(scale) == 1 else self.momentum * scale + (1 - self.momentum) * new)
