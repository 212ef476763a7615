"""Compiled blocks: one graph for all of them, and none more for a second request of the same shape."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from lightx2v.config.load import load_config
from lightx2v.pipeline import LightX2VPipeline

PROMPT = "a red circle on a black background moves left"
SETTINGS = {"sampling.steps": 3, "video.frames": 5, "dtype": "float32"}
QUANTIZED = {"mm_config.mm_type": "int8", "mm_config.weight_auto_quant": True}
OFFLOAD = {"offload.enabled": True, "offload.granularity": "block"}
RULES = {"attention.rules": [{"steps": "0", "type": "torch_sdpa_math"}]}


@pytest.mark.parametrize(
    ("more", "most"), [({}, 1), (QUANTIZED, 1), (OFFLOAD, 1), (RULES, 2)], ids=["plain", "int8", "offload", "rules"]
)
def test_a_second_request_of_the_same_shape_compiles_nothing(
    more: dict[str, object], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    plain = LightX2VPipeline.from_config(load_config(None, SETTINGS | more)).generate(PROMPT, quiet=True)
    pipe = LightX2VPipeline.from_config(load_config(None, SETTINGS | more | {"compile": True}))
    first = pipe.generate(PROMPT, quiet=True)
    assert 1 <= counter.frame_count <= most
    compiled = counter.frame_count
    pipe.generate("a blue square on a white background grows", seed=7, guidance=2.0, quiet=True)
    again = pipe.generate(PROMPT, quiet=True)
    assert counter.frame_count == compiled
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - plain.astype(int)).max() <= 2
