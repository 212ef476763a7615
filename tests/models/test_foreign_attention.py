"""The attention of diffusers' models on our backends: every call of the denoiser, no other, masks as they are meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.attention.base import ATTENTION, Backend
from lightx2v.attention.policy import resolve_policy
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.config.features import AttentionConfig
from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError, LightX2VError
from lightx2v.foreign import PipelineRunner, resolve
from lightx2v.foreign.attention import Routing, routed
from lightx2v.platform import select_device
from tests.models.tiny_pipelines import STEPS, WRITERS, psnr, settings

CPU = select_device("cpu")
CALLS = {"sdxl": 2 * (2 + 4 + 2 + 6 + 3), "pixart": 6, "sd3": 3, "cogvideox": 4}
"""Attentions of the denoiser in one forward: of the UNet two in each transformer of its levels and its middle."""


class Recorder:
    """A backend that computes as torch does and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        self.calls.append((q, k, mask))
        return torch_sdpa(q, k, v, mask=mask, scale=scale)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    fn = Recorder()
    monkeypatch.setitem(ATTENTION._values, "recorder", Backend(fn))
    yield fn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def runner(name: str, folder: Path, **overrides: Any) -> PipelineRunner:
    return PipelineRunner(resolve(load_config(None, settings(name, folder, **overrides)), CPU))


def run(made: PipelineRunner) -> np.ndarray:
    return made.run(made.plan.request, quiet=True)


@pytest.mark.parametrize("name", WRITERS)
def test_every_attention_of_the_denoiser_goes_through_the_backend(
    name: str, folders: dict[str, Path], recorder: Recorder
) -> None:
    plain = run(runner(name, folders[name]))
    made = runner(name, folders[name], **{"attention.type": "recorder"})
    got = run(made)
    assert len(recorder.calls) == CALLS[name] * STEPS
    assert made.routing is not None and made.routing.left == 0
    assert psnr(got, plain) > 60
    denoiser = made.pipeline.components.get("unet") or made.pipeline.transformer
    before = len(recorder.calls)
    assert "forward" not in denoiser.__dict__, "the wrapping outlived the request"
    F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 8))
    assert len(recorder.calls) == before


def test_a_failing_request_leaves_nothing_wrapped(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(ATTENTION._values, "failing", Backend(failing))
    made = runner("sd3", folders["sd3"], **{"attention.type": "failing", "cache.type": "taylorseer"})
    with pytest.raises(RuntimeError, match="no kernel"):
        run(made)
    assert "forward" not in made.pipeline.transformer.__dict__
    assert len(made.pipeline.transformer.transformer_blocks) == 3


def test_eight_bit_attention_in_the_last_steps_only(folders: dict[str, Path]) -> None:
    plain = run(runner("cogvideox", folders["cogvideox"]))
    everywhere = run(runner("cogvideox", folders["cogvideox"], **{"attention.type": "sage_ref_int8_fp8"}))
    rules = [{"type": "sage_ref_int8_fp8", "steps": "3:"}]
    made = runner("cogvideox", folders["cogvideox"], **{"attention.rules": rules})
    partly = run(made)
    assert made.routing is not None and made.routing.taken == CALLS["cogvideox"] * 2
    assert 90 > psnr(partly, plain) > psnr(everywhere, plain) > 30


def test_compiled_blocks_call_the_backend(
    folders: dict[str, Path], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []

    def compile_eagerly(module: nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    plain = run(runner("pixart", folders["pixart"]))
    options = {"compile": True, "attention.type": "recorder", "cache.type": "taylorseer", "cache.interval": 2}
    got = run(runner("pixart", folders["pixart"], **options))
    assert [type(module).__name__ for module in compiled] == ["BasicTransformerBlock"] * 3
    # Three of five steps are computed, and the first forward once more in turn and once as diffusers runs it.
    assert len(recorder.calls) == CALLS["pixart"] * (3 + 2)
    assert 10 < psnr(got, plain) < 90


def test_text_masks_of_pixart_reach_the_backend(folders: dict[str, Path], recorder: Recorder) -> None:
    run(runner("pixart", folders["pixart"], **{"attention.type": "recorder"}))
    masks = [(k.shape[1], mask) for _, k, mask in recorder.calls if mask is not None]
    assert len(masks) == 3 * STEPS  # once in each of three blocks
    for keys, mask in masks:
        assert mask.dtype == torch.bool and mask.shape == (2, 1, 1, keys)
        counts = mask.sum(-1).flatten()
        assert counts[0] < counts[1] < keys  # the negative prompt is the shorter one


class Attending(nn.Module):
    def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, **options)


def routing(name: str, lenient: bool = False) -> Routing:
    policy = resolve_policy(AttentionConfig(type=name), CPU, [(0, "self")], 1, "float32")
    return Routing(policy, lambda: 0, lenient)


def heads(tokens: int = 6, count: int = 4) -> Tensor:
    return torch.randn(2, count, tokens, 8, generator=torch.Generator().manual_seed(tokens * count))


KEYS = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])[:, None, None]
BIAS = torch.zeros(2, 1, 1, 6).masked_fill(~KEYS, -10000.0)
LOWEST = torch.zeros(2, 4, 1, 6).masked_fill(~KEYS, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "mask", [None, KEYS, BIAS, LOWEST, torch.ones(1, 6, dtype=torch.bool), KEYS.expand(2, 1, 6, 6)]
)
def test_masks_come_to_the_same(mask: Tensor | None, recorder: Recorder) -> None:
    q, k, v = heads(), heads() * 2, heads() - 1
    model = Attending()
    with routed(model, routing("recorder")):
        got = model(q, k, v, attn_mask=mask, scale=0.5)
    assert len(recorder.calls) == 1
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5))


def test_grouped_heads(recorder: Recorder) -> None:
    q, k, v = heads(), heads(count=2), heads(count=2) * 3
    model = Attending()
    with routed(model, routing("recorder")):
        got = model(q, k, v, enable_gqa=True)
    assert recorder.calls[0][1].shape == (2, 6, 4, 8)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


CAUSAL = torch.ones(6, 6).tril().bool()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"is_causal": True}, "causal attention"),
        ({"attn_mask": torch.randn(2, 4, 6, 6)}, "scores with a bias"),
        ({"attn_mask": CAUSAL}, "a mask that differs between queries or heads"),
    ],
)
def test_what_a_backend_does_not_take(options: dict[str, Any], what: str, recorder: Recorder) -> None:
    q, k, v = heads(), heads(), heads()
    model = Attending()
    strict, lenient = routing("recorder"), routing("recorder", lenient=True)
    with routed(model, strict), pytest.raises(LightX2VError, match=f"does not take {what}"):
        model(q, k, v, **options)
    with routed(model, lenient):
        got = model(q, k, v, **options)
    assert (lenient.taken, lenient.left) == (0, 1) and not recorder.calls
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention.type": "radial_attn"}, "which tokens are the video's"),
        ({"attention.cross": "torch_sdpa"}, "attention.cross"),
        ({"attention.rules": [{"type": "torch_sdpa", "layers": "0"}]}, "attention.rules"),
        ({"attention.rules": [{"type": "torch_sdpa", "steps": "9:"}]}, "begins beyond"),
    ],
)
def test_attention_that_is_refused(overrides: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        runner("sd3", folders["sd3"], **overrides)
