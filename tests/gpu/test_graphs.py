"""Recorded blocks on an accelerator. Skipped where there are no graphs."""

from __future__ import annotations

import numpy as np
import pytest

from lightx2v.config.load import load_config
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.platform import graph_recorder, list_devices

pytestmark = pytest.mark.gpu
PROMPT = "a red circle on a black background moves left"
CACHE = {"cache.type": "taylorseer"}
BRANCH = {"mm_config.mm_type": "int8", "mm_config.weight_auto_quant": True}
FEW_PASSES = {"mm_config.mm_type": "fp8-triton", "mm_config.weight_auto_quant": True}


@pytest.mark.parametrize("more", [{}, CACHE, BRANCH, FEW_PASSES], ids=["plain", "cache", "int8", "fp8-triton"])
def test_recorded_blocks_give_the_same_frames(more: dict[str, object]) -> None:
    if graph_recorder(list_devices()[0]) is None:
        pytest.skip("no device with graphs is there")
    plain = LightX2VPipeline.from_config(load_config(None, more))
    recorded = LightX2VPipeline.from_config(load_config(None, {"graphs": True, **more}))
    for seed in (1, 2):
        wanted, found = (pipe.generate(PROMPT, seed=seed, quiet=True) for pipe in (plain, recorded))
        assert np.array_equal(found, wanted)
