"""Everything that is decided before weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightx2v.attention.base import Needs
from lightx2v.attention.policy import AttentionPolicy, Slot, resolve_policy
from lightx2v.config.schema import Config
from lightx2v.features.cache.report import Cache
from lightx2v.features.lora.plan import LoraPlan
from lightx2v.features.offload.choose import Placement
from lightx2v.models.spec import FamilySpec
from lightx2v.plan.layers import ComponentPlan
from lightx2v.plan.memory import MemoryEstimate
from lightx2v.plan.render import plan_hash, render
from lightx2v.platform import DeviceInfo
from lightx2v.request import Request


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided before weights are read."""

    config: Config
    family: FamilySpec
    device: DeviceInfo
    files: Any
    """Where the parts of the checkpoint are, as the family's `detect` found them."""
    request: Request
    components: Mapping[str, ComponentPlan]
    """`dit`, and the encoders by the names of the family's parts."""
    slots: tuple[Slot, ...]
    """Every attention of the DiT: its block and its part."""
    attention: AttentionPolicy
    cache: Cache | None
    loras: LoraPlan
    offload: Placement
    """Where the weights of the DiT are."""
    memory: MemoryEstimate

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, which `hash` and `lightx2v explain --json` read."""
        return {
            "model_cls": self.family.name,
            "task": self.request.task,
            "model_path": str(self.files.root),
            "layout": self.files.layout,
            "device": asdict(self.device) | {"free_memory": None},
            "dtype": self.config.dtype,
            "request": self.request.to_json(),
            "components": {name: part.to_json() for name, part in self.components.items()},
            "attention": self.attention.describe(),
            "features": self._features(),
            "memory": {**self.memory.stages, "peak": self.memory.peak},
        }

    def _features(self) -> dict[str, Any]:
        settings = self.offload.settings
        moved = {"reason": self.offload.reason, "host_bytes": self.offload.host}
        return {
            "cache": None if self.cache is None else self.cache.method,
            "lora": self.loras.to_json(),
            "offload": moved if settings.enabled else None,
            "compile": self.config.compile,
            "graphs": self.config.graphs,
            "vae": self.config.vae.model_dump(exclude_defaults=True, exclude={"path", "tae_path"}) or None,
            "unload_modules": self.config.unload_modules,
        }

    @property
    def keep_first(self) -> int:
        """Blocks at the front that the cache computes in every step: offload leaves them on the device."""
        return getattr(self.cache, "first_blocks", 0)

    @property
    def attention_name(self) -> str:
        """The attention backends in one line."""
        return ", ".join(self.attention.functions)

    def attention_for(self, request: Request) -> AttentionPolicy:
        """The attention of a request, whose steps and size may differ from those that were planned."""
        same = ("steps", "height", "width", "frames")
        if all(getattr(request, key) == getattr(self.request, key) for key in same):
            return self.attention
        return plan_attention(self.config, self.device, self.slots, request, self.family, self.files.arch)

    @property
    def hash(self) -> str:
        """Twelve hex digits that two runs share when all that decides their result is the same."""
        return plan_hash(self.to_json())

    def render(self) -> str:
        """The plan as `lightx2v explain` prints it."""
        return render(self.to_json(), self.device)


def plan_attention(
    config: Config, device: DeviceInfo, slots: Sequence[Slot], request: Request, family: FamilySpec, arch: Any
) -> AttentionPolicy:
    """Which backend each attention of a request calls. Raises ConfigError."""
    _, t, h, w = family.latent_shape(request.height, request.width, request.frames)
    needs = Needs(head_dim=arch.head_dim, tokens=t * h * w // math.prod(family.patch_size))
    return resolve_policy(config.attention, device, slots, request.steps, config.dtype, needs)
