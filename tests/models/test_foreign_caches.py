"""Caches on diffusers' models: DeepCache against a slow definition, the others against no cache and diffusers' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, FluxTransformer2DModel, LatteTransformer3DModel
from torch import Tensor

from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError, LightX2VError
from lightx2v.features.cache.store import Holding
from lightx2v.features.cache.taylorseer import TaylorSeer
from lightx2v.foreign import PipelineRunner, resolve
from lightx2v.foreign.forward import Steps
from lightx2v.foreign.stack import StackCache
from lightx2v.platform import select_device
from tests.models.tiny_pipelines import (
    STEPS,
    diffusers_frames,
    psnr,
    randomize,
    settings,
    write_cogvideox,
    write_pixart,
    write_sd3,
    write_sdxl,
)

TRANSFORMERS = {"pixart": write_pixart, "sd3": write_sd3, "cogvideox": write_cogvideox}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    writers = {"sdxl": write_sdxl, **TRANSFORMERS}
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in writers.items()}


def runner(name: str, folder: Path, **overrides: Any) -> PipelineRunner:
    config = load_config(None, settings(name, folder, **overrides))
    return PipelineRunner(resolve(config, select_device("cpu")))


def run(made: PipelineRunner) -> np.ndarray:
    return made.run(made.plan.request, quiet=True)


@contextmanager
def slow_deepcache(unet: Any, interval: int, branch: int) -> Iterator[None]:
    """DeepCache without leaving anything out: the whole UNet runs, and what comes from below is exchanged.

    The layer that takes up connection `branch` gets its hidden state and that connection in one tensor.
    """
    layer = [resnet for block in unet.up_blocks for resnet in block.resnets][-1 - branch]
    connections: list[Tensor] = []
    state: dict[str, Any] = {"step": -1}

    def begin(module: Any, args: Any) -> None:
        state["step"] += 1
        connections.clear()

    def exchange(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = args[0].shape[1] - connections[branch].shape[1]
        if state["step"] % interval == 0:
            state["kept"] = args[0][:, :own]
        return (torch.cat([state["kept"], args[0][:, own:]], dim=1), *args[1:])

    handles = [
        unet.conv_in.register_forward_pre_hook(begin),
        unet.conv_in.register_forward_hook(lambda module, args, output: connections.append(output)),
        layer.register_forward_pre_hook(exchange),
    ]
    for block in unet.down_blocks:
        handles.append(block.register_forward_hook(lambda module, args, output: connections.extend(output[1])))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("branch", range(9))
def test_deepcache_is_as_defined_and_leaves_the_deep_layers_out(branch: int, folders: dict[str, Path]) -> None:
    plain = run(runner("sdxl", folders["sdxl"]))
    made = runner("sdxl", folders["sdxl"], **{"cache.type": "deepcache", "cache.interval": 3, "cache.branch": branch})
    unet = made.pipeline.unet
    counts = {"mid": 0, "layers": 0}
    unet.mid_block.register_forward_hook(lambda *_: counts.update(mid=counts["mid"] + 1))
    for block in unet.up_blocks:
        for resnet in block.resnets:
            resnet.register_forward_hook(lambda *_: counts.update(layers=counts["layers"] + 1))
    got = run(made)
    report = made.caches["unet"].report
    assert (report.computed, report.recalled) == ({"cond": 2}, {"cond": 3})
    assert counts == {"mid": 2, "layers": 2 * 9 + 3 * (branch + 1)}
    assert report.kept_bytes > 0
    theirs = DiffusionPipeline.from_pretrained(folders["sdxl"])
    with slow_deepcache(theirs.unet, 3, branch):
        wanted = diffusers_frames(theirs, "sdxl")
    assert np.array_equal(got, wanted)
    assert psnr(got, plain) < 90
    assert np.array_equal(run(made), got), "the second request has something of the first"


def test_deepcache_of_interval_1_is_exact(folders: dict[str, Path]) -> None:
    plain = run(runner("sdxl", folders["sdxl"]))
    made = runner("sdxl", folders["sdxl"], **{"cache.type": "deepcache", "cache.interval": 1})
    assert np.array_equal(run(made), plain)
    assert made.caches["unet"].report.computed_forwards == STEPS


def test_a_deeper_branch_is_nearer(folders: dict[str, Path]) -> None:
    plain = run(runner("sdxl", folders["sdxl"]))
    options = {"cache.type": "deepcache", "cache.interval": 2}
    errors = [psnr(run(runner("sdxl", folders["sdxl"], **options, **{"cache.branch": b})), plain) for b in (0, 4, 8)]
    assert errors == sorted(errors) and errors[0] > 20


EXACT = {
    "fbcache": {"cache.threshold": 0.0},
    "dbcache": {"cache.threshold": 0.0, "cache.warmup": 0},
    "taylorseer": {"cache.interval": 1},
    "fora": {"cache.interval": 1},
}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_cache_that_recalls_nothing_is_exact(name: str, method: str, folders: dict[str, Path]) -> None:
    made = runner(name, folders[name], **{"cache.type": method}, **EXACT[method])
    assert np.array_equal(run(made), run(runner(name, folders[name])))
    assert made.caches["transformer"].report.computed == {"cond": STEPS}


RECALLING = {
    "taylorseer": {"cache.interval": 2},
    "magcache": {"cache.ratios": [1.0] * STEPS, "cache.retention": 0.0, "cache.max_skip": 1},
    "adacache": {"cache.codebook": [[1.0, 2]]},
    "fora": {"cache.interval": 2},
    "pab": {"cache.interval": 2, "cache.window": [0, 1000]},
}


@pytest.mark.parametrize("method", RECALLING)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recalling_leaves_blocks_out_and_stays_near(name: str, method: str, folders: dict[str, Path]) -> None:
    plain = run(runner(name, folders[name]))
    made = runner(name, folders[name], **{"cache.type": method}, **RECALLING[method])
    count = {"blocks": 0, "parts": 0}
    blocks = made.pipeline.transformer.transformer_blocks
    for block in blocks:
        block.register_forward_hook(lambda *_: count.update(blocks=count["blocks"] + 1))
        attention = block.attn if name == "sd3" else block.attn1
        attention.register_forward_hook(lambda *_: count.update(parts=count["parts"] + 1))
    got = run(made)
    report = made.caches["transformer"].report
    tried = 2 * len(blocks)  # the first request begins with seeing that the blocks run in turn
    assert report.recalled["cond"] >= 1 and report.forwards == STEPS
    whole = method not in ("fora", "pab")
    computed = report.computed["cond"] if whole else STEPS
    assert count["blocks"] == computed * len(blocks) + tried
    assert count["parts"] < STEPS * len(blocks) + tried
    assert 10 < psnr(got, plain) < 90
    assert np.array_equal(run(made), got), "the second request has something of the first"


def test_first_block_cache_is_as_diffusers_has_it(folders: dict[str, Path]) -> None:
    threshold = 0.5
    made = runner("cogvideox", folders["cogvideox"], **{"cache.type": "fbcache", "cache.threshold": threshold})
    got = run(made)
    theirs = DiffusionPipeline.from_pretrained(folders["cogvideox"])
    theirs.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    wanted = diffusers_frames(theirs, "cogvideox")
    assert made.caches["transformer"].report.recalled["cond"] >= 1
    assert psnr(got, wanted) > 60
    assert psnr(got, run(runner("cogvideox", folders["cogvideox"]))) < 60


LOOP = SimpleNamespace(
    num_timesteps=4,
    scheduler=SimpleNamespace(timesteps=torch.tensor([1000.0, 750, 500, 250]), config={"num_train_timesteps": 1000}),
)
"""What `Steps` reads of a pipeline."""


def test_two_lists_of_blocks_are_one_stack() -> None:
    model = randomize(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        1,
    )
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "img_ids": torch.arange(27).view(9, 3).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    latents = torch.randn(1, 9, 8, generator=generator)
    cache = StackCache(TaylorSeer(Holding(), interval=2, order=0))
    steps = Steps(LOOP, 4)
    with torch.no_grad(), cache.attached(model, steps):
        outputs = []
        for step in range(4):
            # Guidance as two forwards a step: each has a state of its own.
            for shift in (0.0, 1.0):
                noisy, time = latents + 0.01 * step + shift, torch.tensor([1 - step / 4])
                outputs.append(model(noisy, timestep=time, **inputs).sample)
            steps.advance()
    assert cache.report.computed == {"cond": 2, "uncond": 2} == cache.report.recalled
    with torch.no_grad():
        plain = model(latents, timestep=torch.tensor([1.0]), **inputs).sample
        other = model(latents + 1, timestep=torch.tensor([1.0]), **inputs).sample
    assert torch.equal(outputs[0], plain) and torch.equal(outputs[1], other)


def test_blocks_that_do_not_run_in_turn_are_refused() -> None:
    """Latte changes between blocks for space and for time, of two lists."""
    model = randomize(
        LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            caption_channels=16,
            video_length=2,
        ),
        1,
    )
    cache = StackCache(TaylorSeer(Holding()))
    inputs = torch.randn(1, 4, 2, 8, 8), torch.tensor([500]), torch.randn(1, 5, 16)
    with torch.no_grad(), cache.attached(model, Steps(LOOP, 4)), pytest.raises(LightX2VError, match="blocks in turn"):
        model(*inputs)
    assert len(model.transformer_blocks) == 2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sdxl", {"cache.type": "deepcache", "cache.branch": 9}, "0 to 8"),
        ("sdxl", {"cache.type": "deepcache", "cache.threshold": 0.1}, "not read by deepcache"),
        ("sdxl", {"cache.type": "fbcache"}, "and on a UNet deepcache"),
        ("sd3", {"cache.type": "deepcache"}, "name a cache for transformers"),
        ("sd3", {"cache.type": "teacache", "cache.coefficients": [1.0, 0.0]}, "needs a model of this engine"),
        ("sd3", {"cache.type": "magcache"}, "cache.ratios"),
        ("sd3", {"cache.type": "dbcache", "cache.first_blocks": 3}, "all of 3"),
        ("sd3", {"cache.type": "fora", "cache.interval": 2, "cache.cfg_gate": 0.5}, "cfg_gate"),
        ("sd3", {"cache.type": "taylorseer", "cache.lite": True}, "cache.lite"),
    ],
)
def test_caches_that_are_refused(name: str, overrides: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        runner(name, folders[name], **overrides)
