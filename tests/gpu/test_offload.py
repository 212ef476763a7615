"""Offload on an accelerator, where copies really run beside the work. Skipped elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightx2v.errors import ConfigError
from lightx2v.models.base import Conditions
from lightx2v.platform import DeviceInfo, host_memory, list_devices, peak_memory, reset_peak_memory, synchronize
from tests.models import offload_models as models

pytestmark = pytest.mark.gpu
LAYERS = 12
MODES: dict[str, dict[str, Any]] = {
    "model": {"granularity": "model"},
    "block": {},
    "third": {"ratio": 0.34},
    "phase": {"granularity": "phase"},
    "lazy": {"lazy_load": True},
    "lazy, half in memory": {"lazy_load": True, "max_memory_gb": 0.002},
}


@cache
def accelerator() -> DeviceInfo:
    device = list_devices()[0]
    if device.kind in ("cpu", "mps"):
        pytest.skip("no accelerator with streams is there")
    return device


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("model"), layers=LAYERS)


def inputs() -> models.Inputs:
    latents, timestep, conditions = models.inputs_of(layers=LAYERS)
    there = accelerator().torch_name
    return latents.to(there), timestep.to(there), Conditions(text=conditions.text.to(there))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mm_type", ["Default", "int8", "fp8", "fp8-b128", "nvfp4-dequantize", "int4-g128-dequantize"])
def test_results_are_bit_equal(file: Path, mm_type: str, mode: str) -> None:
    device = accelerator()
    try:
        plain = models.plain(file, mm_type, layers=LAYERS, device=device)
    except ConfigError as error:
        pytest.skip(str(error))
    wanted = models.run(plain, inputs())
    model, loaded = models.offloaded(file, mm_type, layers=LAYERS, device=device, **MODES[mode])
    for _ in range(3):
        with loaded.running():
            for _ in range(3):
                assert torch.equal(models.run(model, inputs()), wanted)


def test_host_memory_is_page_locked_and_released() -> None:
    device = accelerator()
    memories = [host_memory(size, device) for size in (5000, 2**20 + 1, 5000)]
    assert all(memory.is_pinned() for memory in memories)
    target = torch.empty(2**20 + 1, dtype=torch.uint8, device=device.torch_name)
    memories[1].fill_(7)
    target.copy_(memories[1], non_blocking=True)
    synchronize(device)
    assert bool((target == 7).all())
    del memories


def test_only_two_blocks_are_on_the_device(file: Path) -> None:
    device = accelerator()
    models.run(models.plain(file, layers=LAYERS, device=device), inputs())  # whatever libraries keep for themselves
    model, loaded = models.offloaded(file, layers=LAYERS, device=device)
    reset_peak_memory(device)
    before = peak_memory(device)
    with loaded.running():
        assert peak_memory(device) - before <= 2 * loaded.host_bytes / LAYERS + 1024
        models.run(model, inputs())
