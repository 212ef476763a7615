"""Which caches a denoiser of diffusers can have: DeepCache on a UNet, on a stack of blocks those of our own models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lightx2v.config.features import CacheConfig
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.features.cache import Facts, build
from lightx2v.features.cache.report import CacheReport
from lightx2v.foreign.deepcache import DeepCache, check_unet
from lightx2v.foreign.forward import Steps
from lightx2v.foreign.stack import BlockStack, StackCache
from lightx2v.request import Request

DEEPCACHE = "deepcache"
INTERVAL, BRANCH = 3, 0
"""Of DeepCache, as its authors measure it first."""
_READS = {"type", "interval", "branch"}
_NEED_OUR_MODELS = ("teacache", "custom", "easycache")
"""Methods that ask a model for its modulated input, or that leave out the latents' way in and out as well."""


class Cache(Protocol):
    """What the forwards of one model go through during a request."""

    @property
    def report(self) -> CacheReport: ...

    def attached(self, model: nn.Module, steps: Steps) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class CacheChoice:
    """A method with its options, checked."""

    name: str
    make: Callable[[str], Cache]
    """A cache for the denoiser of that name."""


def choose_cache(config: Config, request: Request, denoisers: Mapping[str, nn.Module]) -> CacheChoice | None:
    """The cache that `config` names. Raises ConfigError where a denoiser cannot have it."""
    section = config.cache
    if section.type == "none":
        return None
    if section.type == DEEPCACHE:
        return _deepcache(section, denoisers)
    gated = "cfg_gate" in _given(section)
    if gated or section.lite or section.type in _NEED_OUR_MODELS:
        refused = "cfg_gate" if gated else "lite" if section.lite else ""
        raise ConfigError(
            f"cache.{refused or 'type'}",
            f"is {'set' if refused else section.type}, and needs a model of this engine",
            allowed="" if refused else "deepcache, fbcache, dbcache, taylorseer, magcache, adacache, fora, pab",
        )

    def facts(model: nn.Module) -> Facts:
        stack: Any = BlockStack(model)
        known = {"task": config.task, "width": 0, "pixels": request.height * request.width, "cfg": request.cfg}
        return Facts.of(stack, family=type(model).__name__, dtype=getattr(torch, config.dtype), **known)

    known = {name: facts(model) for name, model in denoisers.items()}

    def make(name: str) -> Cache:
        feature = build(section, known[name])
        assert feature is not None
        return StackCache(feature)

    for name in known:
        make(name)
    return CacheChoice(section.type, make)


def _deepcache(section: CacheConfig, denoisers: Mapping[str, nn.Module]) -> CacheChoice:
    for name in _given(section) - _READS:
        raise ConfigError(f"cache.{name}", f"is not read by {DEEPCACHE}", allowed="interval, branch")
    interval, branch = section.interval or INTERVAL, BRANCH if section.branch is None else section.branch
    for model in denoisers.values():
        check_unet(model, branch)
    return CacheChoice(f"{DEEPCACHE} (interval {interval}, branch {branch})", lambda _: DeepCache(interval, branch))


def _given(section: CacheConfig) -> set[str]:
    """The settings that are not as they are by default."""
    default = CacheConfig()
    return {name for name, value in section if value != getattr(default, name)}
