"""Offload on a second family, whose blocks are of two kinds and have two streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightx2v.components import dtype_of, empty_dit
from lightx2v.config.features import OffloadConfig
from lightx2v.features.offload.load import load_offloaded
from lightx2v.io.source import CheckpointSource
from lightx2v.models.flux.spec import FLUX
from lightx2v.platform import select_device
from tests.models import tiny_flux

MODES: dict[str, dict[str, Any]] = {
    "model": {"granularity": "model"},
    "block": {},
    "half": {"ratio": 0.5},
    "phase": {"granularity": "phase"},
    "lazy": {"lazy_load": True},
    "lazy phase": {"granularity": "phase", "lazy_load": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@torch.inference_mode()
def test_results_are_bit_equal(tmp_path: Path, layout: tiny_flux.Layout, mode: str) -> None:
    path = tiny_flux.write_dit(tiny_flux.tiny_transformer(), tmp_path, layout)
    plain = tiny_flux.read_dit(path, tiny_flux.tiny_dit().arch)
    model: Any = empty_dit(FLUX, plain.arch, {}, torch.float32, auto_quant=False)
    loaded = load_offloaded(
        model,
        CheckpointSource(FLUX.open(path), FLUX.original_name, FLUX.is_unused),
        OffloadConfig(enabled=True, **MODES[mode]),
        device=select_device("cpu"),
        dtype_of=dtype_of(model, torch.float32),
        where=str(path),
    )
    inputs = tiny_flux.random_inputs(plain.arch, 1, (3, 4))
    wanted = plain(*inputs)
    for _ in range(2):
        with loaded.running(passes=2):
            assert torch.equal(model(*inputs), wanted)
            assert torch.equal(model(*inputs), wanted)


@pytest.mark.parametrize("mode", ["block", "phase", "lazy"])
@torch.inference_mode()
def test_the_signal_of_a_cache_reads_the_first_block(tmp_path: Path, mode: str) -> None:
    path = tiny_flux.write_dit(tiny_flux.tiny_transformer(), tmp_path, "original")
    plain = tiny_flux.read_dit(path, tiny_flux.tiny_dit().arch)
    model: Any = empty_dit(FLUX, plain.arch, {}, torch.float32, auto_quant=False)
    source = CheckpointSource(FLUX.open(path), FLUX.original_name, FLUX.is_unused)
    settings = OffloadConfig(enabled=True, **MODES[mode])
    options: Any = {"device": select_device("cpu"), "dtype_of": dtype_of(model, torch.float32), "where": "here"}
    loaded = load_offloaded(model, source, settings, **options)
    latents, timestep, conditions = tiny_flux.random_inputs(plain.arch, 1, (3, 4))
    signals = []
    for dit in (plain, model):
        stream, context = dit.embed(latents, dit.embed_time(timestep), dit.prepare(conditions))
        with loaded.running():
            signals += [dit.signal(stream, context) for _ in range(3)]
    assert all(torch.equal(signal, signals[0]) for signal in signals)
    assert loaded.report.late == 0
    assert (
        mode == "phase" or loaded.report.units == 2
    )  # one for each `running`: forwards that are left out move nothing
