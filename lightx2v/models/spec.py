"""What the engine knows of a model family without importing its modules."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightx2v.errors import CheckpointError, ConfigError, suggestion
from lightx2v.models.fold import Foldable
from lightx2v.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from lightx2v.io.weights import Checkpoint

DEFAULTS_FILE = "lightx2v_defaults.json"
"""Optional file of a model directory: `{"<task>": {"steps": 20, ...}}`, in place of the family's own defaults."""


@dataclass(frozen=True)
class Defaults:
    """Run settings that hold where neither the JSON nor the command line gives one. Sizes in pixels."""

    steps: int
    shift: float | None
    """None: as the schedule of the checkpoint says, which may go by the number of tokens."""
    guidance: float
    solver: str
    height: int
    width: int
    frames: int
    fps: int
    strength: float | None = None
    """How far the image of an image-to-image request is noised; None: it is seen in another way."""
    step_list: tuple[int, ...] | None = None
    """Timesteps of a step-distilled model."""


class ModelFiles(Protocol):
    """Where the parts of a checkpoint are, as a family's `layout` finds them."""

    @property
    def root(self) -> Path: ...


@dataclass(frozen=True)
class FamilySpec:
    """One family of models. The paths `"module:attribute"` are imported on use."""

    name: str
    tasks: tuple[str, ...]
    defaults: Mapping[str, Defaults]
    """By task."""
    quantized: tuple[str, ...]
    """Globs of the linear layers that `mm_type` applies to."""
    keep: tuple[str, ...]
    """Globs of the layers that are never quantized."""
    sensitive: tuple[str, ...]
    """Globs of the layers that lose most with fewer than 8 bits."""
    vae_stride: tuple[int, int, int]
    """Frames, height, width of a video over those of its latents; the first frame has a latent frame of its own."""
    patch_size: tuple[int, int, int]
    latent_channels: int
    dit: str
    layout: str
    keymap: str
    """Module with `to_original`, `aliases` and `is_unused`."""
    family: str
    """The `families.base.Family`: what surrounds the DiT."""
    embedded_guidance: bool = False
    """Whether the DiT takes the guidance scale as an input; classifier-free guidance is then off by default."""
    foldable: tuple[Foldable, ...] = ()
    """Where multipliers of linears' inputs can go; the first that fits a model counts."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Run settings in place of `defaults` for the models that `files.variant` tells apart."""
    translate: str | None = None
    """Function from a `Checkpoint` of any layout to one of the DiT alone, in the original's pieces; None: all are."""

    @property
    def surroundings(self) -> Any:
        """The `families.base.Family`, imported on use."""
        return _attribute(self.family)

    def build_dit(self, arch: Any) -> nn.Module:
        """The DiT of `arch`, on torch's current default device."""
        module: nn.Module = _attribute(self.dit)(arch)
        return module

    def detect(self, model_path: str | Path, task: str) -> Any:
        """Find the files of a checkpoint of this family for `task`. Raises CheckpointError."""
        return _attribute(self.layout)(model_path, task)

    def open(self, path: str | Path) -> Checkpoint:
        """The DiT's checkpoint: `original_name` gives the model's names, one to one. Raises CheckpointError."""
        from lightx2v.io.dialects.base import Wanted
        from lightx2v.io.dialects.open import open_any

        def quantized(layer: str) -> bool:
            return self.quantizes(self.original_name(layer))

        # A translation puts layers together.
        checkpoint = open_any(path, Wanted(quantized, beyond=True, whole=self.translate is None))
        return checkpoint if self.translate is None else _attribute(self.translate)(checkpoint)

    def quantizes(self, layer: str) -> bool:
        """Whether `mm_type` applies to a linear layer, by its original name."""
        return _matches(layer, self.quantized) and not _matches(layer, self.keep)

    def original_name(self, name: str) -> str:
        """The original name of a tensor of any layout of the family; a name that is not known is returned as it is."""
        renamed: str = _attribute(f"{self.keymap}:to_original")(name)
        return renamed

    def aliases(self, name: str, shape: tuple[int, ...]) -> Iterable[tuple[str, tuple[str, int, int | None, int]]]:
        """Other names of an original tensor of `shape`, in checkpoints and LoRAs, and of parts of it.

        Each with (original, start, stop, first): its rows from `first` on are the rows [start, stop) of `original`.
        """
        found: Iterable[tuple[str, tuple[str, int, int | None, int]]] = _attribute(f"{self.keymap}:aliases")(
            name, shape
        )
        return found

    def is_unused(self, name: str) -> bool:
        """Whether published checkpoints hold this tensor although no layer reads it; such a tensor is left out."""
        unused: bool = _attribute(f"{self.keymap}:is_unused")(name)
        return unused

    def load_defaults(self, files: ModelFiles, task: str) -> dict[str, Any]:
        """Run settings for `task`: the family's, or those that the checkpoint ships in `lightx2v_defaults.json`."""
        path = files.root / DEFAULTS_FILE
        variant = self.variants.get(getattr(files, "variant", ""), {})
        shipped = _read_defaults(path, self.tasks).get(task, {}) if path.is_file() else {}
        return asdict(replace(self.defaults[task], **{**variant, **shipped}))

    def check_size(self, height: int, width: int, frames: int) -> None:
        """Raise ConfigError, with the nearest sizes, where VAE stride and patches do not divide the video."""
        stride, patch = self.vae_stride, self.patch_size
        for key, value, multiple in (("height", height, stride[1] * patch[1]), ("width", width, stride[2] * patch[2])):
            _check_multiple(f"video.{key}", value, multiple, offset=0)
        _check_multiple("video.frames", frames, stride[0] * patch[0], offset=1)

    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
        """[C, t, h, w] of the latents of a video."""
        t, h, w = self.vae_stride
        return (self.latent_channels, (frames - 1) // t + 1, height // h, width // w)


FAMILIES: Registry[FamilySpec] = Registry("model_cls", beside=("diffusers",))
FAMILIES.add("wan2.1", "lightx2v.models.wan.spec:WAN")
FAMILIES.add("wan2.1_distill", "lightx2v.models.wan.spec:WAN_DISTILL")
FAMILIES.add("flux", "lightx2v.models.flux.spec:FLUX")


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _attribute(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _check_multiple(key: str, value: int, multiple: int, offset: int) -> None:
    """`value` must be `offset` plus a multiple of `multiple`, and positive."""
    smallest = offset or multiple
    if value >= smallest and (value - offset) % multiple == 0:
        return
    below = max(smallest, (value - offset) // multiple * multiple + offset)
    nearest = sorted({below, max(smallest, below + multiple)} if value >= smallest else {smallest})
    rule = f"multiples of {multiple}" + (f" plus {offset}" if offset else "")
    raise ConfigError(key, f"{value} does not fit", allowed=f"{rule}; the nearest: {', '.join(map(str, nearest))}")


def _read_defaults(path: Path, tasks: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The checked content of a `lightx2v_defaults.json`."""
    kinds = {"int": int, "float": (int, float), "float | None": (int, float), "str": str}
    types = {field.name: kinds[str(field.type)] for field in fields(Defaults) if str(field.type) in kinds}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(str(path), f"is not JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values()):
        raise CheckpointError(str(path), "is not an object of tasks", allowed='{"t2v": {"steps": 20, ...}, ...}')
    for task, values in content.items():
        if task not in tasks:
            raise CheckpointError(str(path), f"unknown task '{task}'", allowed=", ".join(tasks))
        for key, value in values.items():
            if key not in types:
                raise CheckpointError(
                    str(path), f"unknown key '{key}'{suggestion(key, types)}", allowed=", ".join(types)
                )
            if not isinstance(value, types[key]) or isinstance(value, bool):  # type: ignore[arg-type]
                raise CheckpointError(str(path), f"{task}.{key} is {value!r}", do="correct its type")
    return content
