"""Against diffusers' own implementation of the same method, on the same weights and noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from torch import Tensor

from lightx2v.features.cache import Cache
from lightx2v.features.cache.fbcache import FBCache
from lightx2v.features.cache.magcache import MagCache
from lightx2v.features.cache.pab import Pab
from lightx2v.features.cache.store import Holding
from lightx2v.models.base import Branch, Conditions
from lightx2v.sampling.loop import denoise, guided
from lightx2v.sampling.schedule import Solver, initial_noise
from tests.models import tiny_checkpoints
from tests.models.cache_runs import run_request, trained_wan, wan_conditions

STEPS = 20
SHAPE = (1, 16, 3, 4, 4)
RATIOS = [1.0, *(0.99 - 0.004 * step for step in range(STEPS - 1))]


@torch.inference_mode()
def theirs(conditions: Mapping[Branch, Conditions], config: Any) -> Tensor:
    """The latents of the same request through diffusers' model; `config` is told the timestep if it asks."""
    dit = trained_wan()
    twin = tiny_checkpoints.diffusers_twin(dit)
    now = [0.0]
    if isinstance(config, PyramidAttentionBroadcastConfig):
        config.current_timestep_callback = lambda: now[0]
    if config is not None:
        twin.enable_cache(config)
    solver = Solver("euler", STEPS, 3.0)
    text = {
        branch: torch.nn.functional.pad(made.text, (0, 0, 0, dit.arch.text_len - made.text.shape[1]))
        for branch, made in conditions.items()
    }

    def predict(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
        now[0] = float(timestep)
        with twin.cache_context(branch):
            found: Tensor = twin(latents, timestep, text[branch], return_dict=False)[0]
        return found

    guidance = 2.0 if len(conditions) == 2 else 1.0
    return denoise(initial_noise(SHAPE, 0, torch.device("cpu")), solver, guided(predict, guidance))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("branches", "cache", "config"),
    [
        (("cond", "uncond"), FBCache(Holding(), 0.15, separate=True), FirstBlockCacheConfig(0.15)),
        (
            ("cond", "uncond"),
            MagCache(Holding(), dict.fromkeys(("cond", "uncond"), RATIOS), 0.1, 3, 0.2),
            MagCacheConfig(0.1, 3, 0.2, STEPS, RATIOS),
        ),
        (  # theirs counts the two branches as steps of one
            ("cond",),
            Pab(Holding(), 2, (100.0, 800.0)),
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                cross_attention_block_skip_range=6,
                spatial_attention_timestep_skip_range=(100, 800),
                cross_attention_timestep_skip_range=(100, 800),
            ),
        ),
    ],
    ids=["fbcache", "magcache", "pab"],
)
def test_the_result_is_theirs(branches: tuple[Branch, ...], cache: Cache, config: Any) -> None:
    dit = trained_wan()
    conditions = wan_conditions(dit, branches)
    plain = run_request(dit, conditions, SHAPE, steps=STEPS).latents
    assert error(theirs(conditions, None), plain) < 1e-4
    found = run_request(dit, conditions, SHAPE, cache, steps=STEPS).latents
    assert cache.report.computed_forwards < cache.report.forwards
    assert error(found, plain) > 0.005
    assert error(found, theirs(conditions, config)) < 1e-4
