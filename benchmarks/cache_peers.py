"""Caches of diffusers and of cache-dit, on diffusers' transformer with the weights of a plan, for `caches.py`.

A peer's model takes the place of the DiT in the loop of this engine: same sampler, noise, text and guidance.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.bench.peers.base import Choice
from lightx2v.bench.peers.diffusers import PEER
from lightx2v.bench.peers.pipeline import load_transformer
from lightx2v.features.cache import Calibration
from lightx2v.models.base import Branch, Conditions
from lightx2v.plan import Plan
from lightx2v.plan.sampling import guidance_scales, plan_sampler
from lightx2v.platform import probe
from lightx2v.request import Request
from lightx2v.sampling.loop import denoise, guided
from lightx2v.sampling.schedule import noise_source

MODULES = r"blocks\.\d+\.(attn1|attn2|ffn)"
"""Of diffusers' Wan: all that its default pattern for TaylorSeer, which matches none of them, means to match."""


@dataclass(frozen=True)
class PeerCache:
    """One method of a peer in one setting."""

    name: str
    setting: str
    attach: Callable[[PeerModel], None] = lambda model: None
    batched: bool = False
    """Both branches of guidance in one forward, which some methods need."""


class PeerModel:
    """diffusers' transformer with a cache of its own or of cache-dit's."""

    def __init__(self, plan: Plan, cache: PeerCache) -> None:
        self.plan, self.cache, self.now = plan, cache, 1000.0
        self.device, self.dtype = torch.device(plan.device.torch_name), getattr(torch, plan.config.dtype)
        self.model: Any = load_transformer(plan, Choice(PEER, False), self.device)
        self.blocks: list[nn.Module] = list(self.model.blocks)
        self.refresh: Callable[[], None] = self.model._reset_stateful_cache
        cache.attach(self)

    @property
    def parts(self) -> list[dict[str, nn.Module]]:
        """What only runs when the part of a block is computed, by part."""
        blocks: list[Any] = self.blocks
        return [{"self": b.attn1.to_q, "cross": b.attn2.to_q, "mlp": b.ffn.net[-1]} for b in blocks]

    def run(self, request: Request, conditions: Mapping[Branch, Conditions]) -> Tensor:
        """Clean latents of a request."""
        plan = self.plan
        sampler = plan_sampler(plan.config, plan.family, plan.files, request, self.device)
        shape = (1, *plan.family.latent_shape(request.height, request.width, request.frames))
        latents = sampler.start(shape, noise_source(request.seed, self.device))
        text = {branch: made.text.to(self.dtype) for branch, made in conditions.items()}
        held: dict[Branch, Tensor] = {}

        def predict(noisy: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
            self.now = float(timestep)
            if not self.cache.batched:
                return self._forward(noisy, timestep, text[branch], branch)
            if branch == "cond":
                both = torch.cat([text["uncond"], text["cond"]])
                made = self._forward(noisy.expand(2, -1, -1, -1, -1), timestep.expand(2), both, "both")
                held["uncond"], held["cond"] = made.chunk(2)
            return held[branch]

        self.refresh()
        return denoise(latents, sampler, guided(predict, guidance_scales(plan.config, request, sampler.steps)))

    def _forward(self, noisy: Tensor, timestep: Tensor, text: Tensor, name: str) -> Tensor:
        with self.model.cache_context(name):
            made: Tensor = self.model(
                hidden_states=noisy.to(self.dtype), timestep=timestep, encoder_hidden_states=text, return_dict=False
            )[0]
        return made


def hooked(make: Callable[[PeerModel], Any]) -> Callable[[PeerModel], None]:
    """Attaches a configuration of diffusers."""
    return lambda peer: peer.model.enable_cache(make(peer))


def first_block(threshold: float) -> PeerCache:
    def make(peer: PeerModel) -> Any:
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold)

    return PeerCache("diffusers FirstBlockCache", f"{threshold:g}", hooked(make))


def mag(threshold: float, max_skip: int, steps: int, known: Calibration) -> PeerCache:
    """It has one list of ratios: the mean of both branches."""
    ratios = [sum(pair) / 2 for pair in zip(known.ratios["cond"], known.ratios["uncond"], strict=True)]

    def make(peer: PeerModel) -> Any:
        from diffusers import MagCacheConfig

        return MagCacheConfig(threshold, max_skip, 0.2, steps, ratios)

    return PeerCache("diffusers MagCache", f"{threshold:g}, {max_skip} in a row", hooked(make))


def taylor(interval: int, before: int, lite: bool) -> PeerCache:
    def make(peer: PeerModel) -> Any:
        from diffusers import TaylorSeerCacheConfig

        what: dict[str, Any] = {"use_lite_mode": True} if lite else {"cache_identifiers": [MODULES]}
        return TaylorSeerCacheConfig(interval, before, **what)

    form = "lite" if lite else "every module"
    return PeerCache("diffusers TaylorSeer", f"{form}, interval {interval}, {before} first", hooked(make))


def pyramid(interval: int, batched: bool) -> PeerCache:
    def make(peer: PeerModel) -> Any:
        from diffusers import PyramidAttentionBroadcastConfig

        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval,
            cross_attention_block_skip_range=3 * interval,
            current_timestep_callback=lambda: peer.now,
        )

    form = "branches in a batch" if batched else "branches in turn"
    return PeerCache("diffusers PAB", f"{interval} and {3 * interval}, {form}", hooked(make), batched)


def faster(every: int) -> PeerCache:
    def make(peer: PeerModel) -> Any:
        from diffusers import FasterCacheConfig

        return FasterCacheConfig(unconditional_batch_skip_range=every, current_timestep_callback=lambda: peer.now)

    return PeerCache("diffusers FasterCache", f"unconditional every {every}", hooked(make), batched=True)


def dual_block(first: int, last: int, warmup: int, threshold: float, steps: int, seer: bool = False) -> PeerCache:
    def attach(peer: PeerModel) -> None:
        import cache_dit

        settings: dict[str, Any] = {
            "cache_config": cache_dit.DBCacheConfig(
                Fn_compute_blocks=first,
                Bn_compute_blocks=last,
                max_warmup_steps=warmup,
                residual_diff_threshold=threshold,
                enable_separate_cfg=True,
                num_inference_steps=steps,
            ),
            "calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if seer else None,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        cache_dit.enable_cache(peer.model, **given)
        peer.refresh = lambda: cache_dit.refresh_context(peer.model, **given)

    name = "cache-dit DBCache" + (" + TaylorSeer" if seer else "")
    return PeerCache(name, f"F{first}B{last}, {warmup} first, {threshold:g}", attach)


def missing() -> dict[str, str]:
    """Peers that cannot take part, and why."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    found = {name: probe(name) for name in ("diffusers", "cache_dit")}
    return {name: known.reason for name, known in found.items() if known.reason is not None}
