"""DeepCache (arXiv 2312.00858): of every `interval` steps one computes the whole UNet, the others its outer layers.

A UNet's skip connections are counted from the outside: 0 is what its first convolution gives, then one for every layer
and downsampler on the way down. Each is taken up by one layer on the way up. With `branch` b, a step that computes all
keeps what flows into the layer that takes up connection b; the steps after it compute the connections 0 to b, and from
that layer on with what was kept. The layers below are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightx2v.errors import ConfigError
from lightx2v.features.cache.report import CacheReport
from lightx2v.foreign.forward import Forward, Steps, twin, wrapped_forward
from lightx2v.models.base import Branch

_KNOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
"""Blocks of diffusers that are a list of layers, each one residual block and at most one transformer."""


def check_unet(model: Any, branch: int) -> None:
    """Raise ConfigError for a model that is no such UNet, and for a connection that it does not have."""
    blocks = [*getattr(model, "down_blocks", ()), *getattr(model, "up_blocks", ())]
    kinds = {type(block).__name__ for block in blocks}
    if type(model).__name__ != "UNet2DConditionModel" or not kinds <= set(_KNOWN):
        what = f"blocks {', '.join(sorted(kinds - set(_KNOWN)))} in it" if kinds else "its blocks in one line"
        raise ConfigError(
            "cache.type", f"is deepcache, and '{type(model).__name__}' has {what}", do="name a cache for transformers"
        )
    last = len(_up_layers(model)) - 1
    if branch > last:
        raise ConfigError("cache.branch", f"is {branch}", allowed=f"0 to {last}, the skip connections of this UNet")


class DeepCache:
    """The method for one UNet. `report` counts the forwards of the latest request, and what was kept."""

    def __init__(self, interval: int, branch: int) -> None:
        self.interval, self.branch = interval, branch
        self.report = CacheReport("deepcache")

    @contextmanager
    def attached(self, unet: nn.Module, steps: Steps) -> Iterator[None]:
        """`unet` runs with the cache inside the block. What is kept belongs to one request: the block is made anew."""
        self.report = report = CacheReport("deepcache")
        outer, deep = _Outer(unet, self.branch), dict[Branch, Tensor]()

        def wrap(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                branch = steps.branch(unet)
                computed = steps.step % self.interval == 0 or branch not in deep
                report.count(branch, computed)
                if not computed:
                    return outer.run(deep[branch], *args, **kwargs)
                with outer.watched(lambda feature: deep.__setitem__(branch, feature)):
                    result = forward(*args, **kwargs)
                kept = sum(feature.nbytes for feature in deep.values())
                report.kept(kept, kept)
                return result

            return run

        with wrapped_forward(unet, wrap):
            yield


class _Outer:
    """The outer layers of a UNet as a UNet of their own, on the same weights; its middle recalls the deep feature."""

    def __init__(self, unet: Any, branch: int) -> None:
        self.up, self.layer = _up_layers(unet)[-1 - branch]
        self.source = unet.up_blocks[self.up]
        self.model: Any = twin(unet)
        self.model.down_blocks = nn.ModuleList(_first_layers(unet.down_blocks, branch))
        self.model.mid_block = self.recall = _Recall()
        first = twin(self.source)
        for name in ("resnets", "attentions"):
            if (layers := getattr(self.source, name, None)) is not None:
                setattr(first, name, nn.ModuleList(layers[self.layer :]))
        self.model.up_blocks = nn.ModuleList([first, *unet.up_blocks[self.up + 1 :]])

    def run(self, feature: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.recall.feature = feature
        try:
            return self.model(*args, **kwargs)
        finally:
            self.recall.feature = None

    @contextmanager
    def watched(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside the block, a forward of the whole UNet gives `keep` what flows into the first of the outer layers."""
        if self.layer == 0:
            handle = self.source.register_forward_pre_hook(
                lambda module, args, kwargs: keep(kwargs["hidden_states"]), with_kwargs=True
            )
        else:
            before = getattr(self.source, "attentions", self.source.resnets)[self.layer - 1]
            handle = before.register_forward_hook(
                lambda module, args, output: keep(output[0] if isinstance(output, tuple) else output)
            )
        try:
            yield
        finally:
            handle.remove()


class _Recall(nn.Module):
    """Stands for all that is not computed."""

    feature: Tensor | None = None

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        assert self.feature is not None
        return self.feature


def _up_layers(unet: Any) -> list[tuple[int, int]]:
    """The layers on the way up in order, as (block, layer): the last takes up connection 0."""
    return [(number, layer) for number, block in enumerate(unet.up_blocks) for layer in range(len(block.resnets))]


def _first_layers(blocks: Any, count: int) -> list[nn.Module]:
    """The beginning of the way down that makes `count` skip connections."""
    taken: list[nn.Module] = []
    for block in blocks:
        makes = len(block.resnets) + (block.downsamplers is not None)
        if count >= makes:
            taken.append(block)
        elif count > 0:
            part = twin(block)
            part.downsamplers = None
            for name in ("resnets", "attentions"):
                if (layers := getattr(block, name, None)) is not None:
                    setattr(part, name, nn.ModuleList(layers[:count]))
            taken.append(part)
        count -= makes
    return taken
