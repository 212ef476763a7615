"""Nothing inside the denoising loop makes the host wait for the device: on a GPU that is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightx2v import denoising
from lightx2v.components import load_dit
from lightx2v.config.load import load_config
from lightx2v.features.offload import load as offload_load
from lightx2v.mm import triton as triton_library
from lightx2v.models.base import Branch, Conditions
from lightx2v.plan import Plan, resolve
from lightx2v.platform import CopyQueue, probe, select_device
from tests.e2e.flux_dirs import write_model
from tests.models.absent_gpu import GPU, HostWaitError, absent_gpu, move

pytestmark = pytest.mark.skipif(probe("triton").version is None, reason=f"triton is {probe('triton').reason}")
CPU = select_device("cpu")
FP8 = {"mm_config.mm_type": "fp8-triton", "mm_config.weight_auto_quant": True, "attention.type": "torch_sdpa"}
WAN: dict[str, dict[str, object]] = {
    "plain": {},
    "int8": {"mm_config.mm_type": "int8-triton"},
    "blocks": {"mm_config.mm_type": "fp8-b128-triton"},
    "unquantized": {"mm_config.mm_type": "Default", "mm_config.weight_auto_quant": False},
    "attention of codes": {"attention.type": "triton_8bit", "attention.cross": "torch_sdpa"},
    "euler": {"sampling.solver": "euler"},
    "dpm": {"sampling.solver": "dpm++"},
    "magcache": {"cache.type": "magcache", "cache.ratios": [1.0] * 12},
    "taylorseer": {"cache.type": "taylorseer"},
    "pab, kept as fp8": {"cache.type": "pab", "cache.store": "fp8"},
    "fora, guidance left out": {"cache.type": "fora", "cache.cfg_gate": 0.5},
}


def conditions(plan: Plan, device: str) -> dict[Branch, Conditions]:
    arch = plan.files.arch
    text = torch.randn(1, 5, arch.text_dim).bfloat16().to(device)
    pooled = torch.randn(1, arch.pooled_dim).bfloat16().to(device) if hasattr(arch, "pooled_dim") else None
    made = Conditions(text=text, pooled=pooled, guidance=3.5 if pooled is not None else None)
    return {"cond": made, "uncond": made} if plan.request.cfg else {"cond": made}


def run_watched(more: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The operators of the loop of one request. Raises HostWaitError."""
    monkeypatch.setattr(triton_library, "trial", lambda *_: None)
    plan = resolve(load_config(None, {**FP8, **more}), GPU)
    loop: Any = denoising.denoise
    with torch.inference_mode():
        loaded = load_dit(replace(plan, device=CPU))
        with absent_gpu() as gpu:
            move(loaded.model)
            loaded = replace(loaded, once=SimpleNamespace(present=nullcontext))  # type: ignore[arg-type]

            def watched(latents: Tensor, *args: Any) -> Tensor:
                with gpu.watching():
                    loop(latents, *args)
                return torch.zeros(())  # what follows looks whether the result is finite

            monkeypatch.setattr(denoising, "denoise", watched)
            denoising.denoise_request(plan, loaded, plan.request, conditions(plan, "meta"), quiet=True)
    return gpu.counts


@pytest.mark.parametrize("more", WAN.values(), ids=WAN.keys())
def test_wan_waits_for_nothing(more: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = run_watched({"sampling.steps": 6, **more}, monkeypatch)
    assert counts["triton_rms_rope"] > 0
    if "attention.type" in more:
        assert counts["triton_attention_turned"] == 48  # queries and keys have no pass of their own
    if not more:  # four blocks, six steps, two branches
        passes = {name: counts[f"triton_{name}"] for name in ("layer_norm_codes", "sum_norm_codes", "gelu_codes")}
        assert passes == {"layer_norm_codes": 48, "sum_norm_codes": 96, "gelu_codes": 48}
        assert counts["triton_quantize_tokens"] == 2 * 48 + 8  # outputs of attention, and the text once a block


@pytest.mark.parametrize("more", [{}, {"cache.type": "taylorseer"}], ids=["plain", "taylorseer"])
def test_flux_waits_for_nothing(more: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "model", "dev", "diffusers")
    size = {"target_height": 32, "target_width": 48, "sampling.steps": 4}
    what = {"model_cls": "flux", "task": "t2i", "model_path": str(path), "prompt": "a red circle"}
    counts = run_watched({**what, **size, **more}, monkeypatch)
    assert counts["triton_sum_norm_codes"] > 0 and counts["triton_multiply_rows"] > 0


@pytest.mark.parametrize("method", ["fbcache", "easycache"])
def test_a_cache_that_looks_at_the_data_is_seen_to_wait(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostWaitError, match="cache"):
        run_watched({"cache.type": method}, monkeypatch)


def _item(x: Tensor) -> object:
    return x.sum().item()


def _copy_back(x: Tensor) -> object:
    return x.cpu()


def _copy_there(x: Tensor) -> object:
    return torch.tensor([1.0, 2.0], device=x.device)


def _write_there(x: Tensor) -> object:
    return x.copy_(torch.zeros(3))


def _mask(x: Tensor) -> object:
    return x[x > 0]


def _truth(x: Tensor) -> object:
    return bool((x > 0).any())


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("wait", [_item, _copy_back, _copy_there, _write_there, _mask, _truth])
def test_every_kind_of_wait_is_seen(wait: Any, inference: bool) -> None:
    with torch.inference_mode(inference), absent_gpu() as gpu:
        x = torch.ones(3, device="meta")
        with gpu.watching():
            (x + 1).to(torch.bfloat16).copy_(x)
            x.copy_(torch.zeros(3), non_blocking=True)
            float(torch.ones(3).sum())  # the host's own
            with pytest.raises(HostWaitError):
                wait(x)


class MarkedQueue(CopyQueue):
    """The marks of a device's queue, and how often the host waited for one."""

    waits = 0

    def copy(self, target: Tensor, source: Tensor, after: Any = None) -> Any:
        target.copy_(source)
        return object()

    def mark(self) -> Any:
        return object()

    def wait(self, mark: Any) -> None:
        assert mark is not None

    def wait_here(self, mark: Any) -> None:
        MarkedQueue.waits += mark is not None


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(offload_load, "CopyQueue", MarkedQueue)
    MarkedQueue.waits = 0
    yield
    assert MarkedQueue.waits == 1  # for what is on its way when the slots are given up


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize("granularity", ["block", "phase"])
@pytest.mark.parametrize("cache", ["none", "taylorseer"])
def test_offload_waits_for_no_copy(granularity: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"offload.enabled": True, "offload.granularity": granularity, "cache.type": cache, "sampling.steps": 4}
    plan = resolve(load_config(None, more), CPU)
    loop: Any = denoising.denoise

    def watched(*args: Any) -> Tensor:
        before = MarkedQueue.waits
        result: Tensor = loop(*args)
        assert MarkedQueue.waits == before
        return result

    monkeypatch.setattr(denoising, "denoise", watched)
    with torch.inference_mode():
        loaded = load_dit(plan)
        denoising.denoise_request(plan, loaded, plan.request, conditions(plan, "cpu"), quiet=True)
    assert loaded.offloaded is not None and loaded.offloaded.report.units > len(loaded.model.blocks)
