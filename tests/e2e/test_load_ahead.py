"""The DiT loads while the encoders load and compute, and the VAE as the configuration says."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from lightx2v import LightX2VPipeline
from lightx2v.components import Components
from lightx2v.config.load import load_config
from lightx2v.errors import CheckpointError
from lightx2v.eval.metrics import psnr

PROMPT = "a red circle on a white background moves right"
SHORT = {"sampling.steps": 2, "device": "cpu"}


def pipeline(**more: object) -> LightX2VPipeline:
    return LightX2VPipeline.from_config(
        load_config(None, {**SHORT, **{k.replace("__", "."): v for k, v in more.items()}})
    )


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    """By the main thread alone."""
    frames: np.ndarray = pipeline().generate(PROMPT, seed=1, quiet=True)
    return frames


def test_the_dit_loads_beside_the_encoders(plain: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, loads = threading.Event(), []
    real = Components._load

    def load(self: Components, name: str) -> Any:
        loads.append((name, threading.current_thread() is threading.main_thread()))
        if name == "dit":
            begun.set()
        else:
            assert begun.wait(60), f"{name} loads before the DiT has begun to"
        return real(self, name)

    monkeypatch.setattr(Components, "loads_ahead", True)
    monkeypatch.setattr(Components, "_load", load)
    pipe = pipeline()
    assert np.array_equal(pipe.generate(PROMPT, seed=1, quiet=True), plain)
    assert sorted(loads) == [("dit", False), ("t5", True), ("vae", True)]
    assert np.array_equal(pipe.generate(PROMPT, seed=1, quiet=True), plain)  # with what is there
    assert len(loads) == 3


def test_what_goes_wrong_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Components._load

    def load(self: Components, name: str) -> Any:
        if name == "dit":
            raise CheckpointError("a file", "is damaged")
        return real(self, name)

    monkeypatch.setattr(Components, "loads_ahead", True)
    monkeypatch.setattr(Components, "_load", load)
    with pytest.raises(CheckpointError, match="damaged"):
        pipeline().generate(PROMPT, seed=1, quiet=True)


def test_one_model_at_a_time_loads_nothing_ahead(plain: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Components, "_load_apart", lambda *_: pytest.fail("loaded ahead"))
    assert np.array_equal(pipeline(unload_modules=True).generate(PROMPT, seed=1, quiet=True), plain)
    assert np.array_equal(pipeline().generate(PROMPT, seed=1, quiet=True), plain)  # a CPU has no cores to spare


def test_the_vae_computes_as_it_is_told(plain: np.ndarray) -> None:
    rounded = pipeline(vae__dtype="bfloat16").generate(PROMPT, seed=1, quiet=True)
    assert 35 < psnr(rounded, plain) < 80
    ordered = pipeline(vae__channels_last=True).generate(PROMPT, seed=1, quiet=True)
    assert psnr(ordered, plain) > 60
