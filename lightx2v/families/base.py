"""What surrounds the DiT of a family: the models beside it, and the way from a request to conditions and to pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightx2v.config.schema import Config
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.select import LayerPlan
from lightx2v.models.base import Branch, Conditions
from lightx2v.request import Request
from lightx2v.timing import StageTimer

Kind = Literal["text_encoder", "image_encoder", "vae"]


@dataclass(frozen=True)
class PartSource:
    """From what a part is loaded, and onto what."""

    path: Path
    files: Any
    """What the family's `detect` found."""
    device: torch.device
    dtype: torch.dtype
    quant_plans: Mapping[str, LayerPlan]
    config: Config


def open_checkpoint(path: Path, quantized: bool) -> Checkpoint:
    """For `Part.open`: a file or folder with the part alone."""
    return Checkpoint.open(path)


@dataclass(frozen=True)
class Part:
    """One model beside the DiT."""

    name: str
    kind: Kind
    file: str
    """Its name in `files.require`."""
    load: Callable[[PartSource], Any]
    shapes: Callable[[Checkpoint], Mapping[str, tuple[int, int]]] | None = None
    """(N, K) of the linears that can be quantized, by name; None: never quantized, and computed in float32."""
    config: Literal["t5", "clip"] | None = None
    """The section of the configuration that says how it is quantized."""
    converted: tuple[str, ...] = ()
    """Where LightX2V puts quantized files of it, below the model's folder; {kind} is int8 or fp8."""
    model_type: str | None = None
    """What the converter calls it."""
    needed: Callable[[Config], bool] = lambda config: True
    """Whether a run with this configuration needs it."""
    path: Callable[[Config], str | None] = lambda config: None
    """Where the configuration says it is, in place of `file`."""
    open: Callable[[Path, bool], Checkpoint] = open_checkpoint
    """From its path, and whether quantized weights are wanted as they are, to its tensors."""

    def find(self, config: Config, files: Any) -> Path:
        """Where its weights are, unquantized. Raises CheckpointError."""
        given = self.path(config)
        found: Path = files.require(self.file) if given is None else Path(given)
        return found


class Parts(Protocol):
    """Gives the loaded parts by name."""

    def use(self, name: str, timer: StageTimer) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Session:
    """What a family works with while it serves one request."""

    parts: Parts
    timer: StageTimer
    config: Config
    files: Any
    device: torch.device
    dtype: torch.dtype

    def use(self, name: str) -> AbstractContextManager[Any]:
        return self.parts.use(name, self.timer)

    @property
    def text_len(self) -> int:
        """Tokens that a prompt is padded to."""
        length: int = self.config.text_len or self.files.arch.text_len
        return length


class Family(Protocol):
    """One family, beyond its DiT."""

    parts: tuple[Part, ...]

    def check(self, request: Request) -> None:
        """Raise ConfigError for a request that lacks what its task needs."""
        ...

    def kept(self, arch: Any, request: Request) -> int:
        """Numbers that the blocks remember from step to step, for one branch."""
        ...

    def more_tokens(self, files: Any, request: Request) -> int:
        """Tokens of the DiT's sequence beside those of the latents."""
        ...

    def encode(self, session: Session, request: Request) -> dict[Branch, Conditions]:
        """The conditions of each branch that the request runs."""
        ...

    def image_latents(self, session: Session, request: Request) -> Tensor | None:
        """Latents [1, C, t, h, w] of the image that an image-to-image request starts from; None: pure noise."""
        ...

    def decode(self, session: Session, latents: Tensor) -> Tensor:
        """Latents [1, C, t, h, w] to pixels [1, 3, T, H, W] in [-1, 1]."""
        ...
