"""The denoising loop on an accelerator that tells where the host waits for it. Skipped where none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightx2v import denoising
from lightx2v.config.load import load_config
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.platform import forbid_host_waits, list_devices

pytestmark = pytest.mark.gpu
PROMPT = "a red circle on a black background moves left"
RUNS: dict[str, dict[str, object]] = {
    "plain": {},
    "fp8": {"mm_config.mm_type": "fp8-triton", "mm_config.weight_auto_quant": True},
    "cache": {"cache.type": "taylorseer"},
    "offload": {"offload.enabled": True},
    "graphs": {"graphs": True},
}


def test_a_wait_is_an_error() -> None:
    device = list_devices()[0]
    if device.kind != "cuda":
        pytest.skip("no device that tells")
    x = torch.ones(3, device=device.torch_name)
    with forbid_host_waits(device), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS.keys())
def test_the_loop_waits_for_nothing(more: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    device = list_devices()[0]
    if device.kind != "cuda":
        pytest.skip("no device that tells")
    pipeline = LightX2VPipeline.from_config(load_config(None, more))
    pipeline.generate(PROMPT, seed=1, quiet=True)  # which compiles kernels, chooses tiles and records graphs
    loop: Any = denoising.denoise

    def watched(*args: Any) -> Tensor:
        with forbid_host_waits(device):
            result: Tensor = loop(*args)
        return result

    monkeypatch.setattr(denoising, "denoise", watched)
    pipeline.generate(PROMPT, seed=2, quiet=True)
