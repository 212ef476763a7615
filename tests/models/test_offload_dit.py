"""Offloaded models: bit for bit the results of the same model in memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightx2v.errors import CheckpointError
from lightx2v.features.compile import compile_blocks
from lightx2v.features.once import OnceParts
from lightx2v.mm.lowrank import LowRankLinear
from lightx2v.models.base import run_blocks
from tests.models import offload_models as models
from tests.models import tiny_checkpoints as tiny

BLOCK = {"granularity": "block"}
MODES: dict[str, dict[str, Any]] = {
    "model": {"granularity": "model"},
    "block": BLOCK,
    "half of the blocks": BLOCK | {"ratio": 0.5},
    "phase": {"granularity": "phase"},
    "lazy block": BLOCK | {"lazy_load": True},
    "lazy phase": {"granularity": "phase", "lazy_load": True, "workers": 3},
}
TYPES = ["int8", "int8-torch", "int8-reference", "fp8", "fp8-torch", "fp8-b128", "fp8-pertensor"]
TYPES += ["mxfp8", "mxfp6-mxfp8", "mxfp4", "nvfp4", "int4-g128", "gguf-Q8_0", "gguf-Q4_0", "Default-Force-FP32"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("model"))


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mm_type", ["Default", *TYPES])
def test_results_are_bit_equal(file: Path, mm_type: str, mode: str) -> None:
    model, loaded = models.offloaded(file, mm_type, **MODES[mode])
    wanted = models.run(models.plain(file, mm_type), models.inputs_of())
    for _ in range(2):
        with loaded.running():
            assert same(models.run(model, models.inputs_of()), wanted)
            assert same(models.run(model, models.inputs_of()), wanted)
    assert loaded.report.units > 0


def test_streamed_weights_move_once_for_each_forward(file: Path) -> None:
    model, loaded = models.offloaded(file, **BLOCK)
    with loaded.running(passes=3):
        for _ in range(3):
            models.run(model, models.inputs_of())
    assert (loaded.report.units, loaded.report.late) == (3 * models.LAYERS, 0)
    assert loaded.host_bytes == pytest.approx(loaded.report.nbytes / 3)


def test_phases_move_once_for_each_forward(file: Path) -> None:
    model, loaded = models.offloaded(file, granularity="phase")
    with loaded.running(passes=2):
        for _ in range(2):
            models.run(model, models.inputs_of())
    # The keys and values of the text are made before the first part of a block; that moves nothing twice.
    assert loaded.report.units == 2 * 3 * models.LAYERS


def test_half_of_the_blocks_stay(file: Path) -> None:
    model, loaded = models.offloaded(file, **BLOCK, ratio=0.4)
    with loaded.running(passes=1):
        models.run(model, models.inputs_of())
    assert loaded.report.units == 2
    _, loaded = models.offloaded(file, **BLOCK, keep_first=3)
    with loaded.running(passes=1):
        assert loaded.report.units == 1


def test_the_whole_model_moves_once_for_each_request(file: Path) -> None:
    model, loaded = models.offloaded(file, granularity="model")
    with loaded.running(passes=7):
        assert loaded.report.units == models.LAYERS + 1
        for _ in range(2):
            models.run(model, models.inputs_of())
    assert loaded.report.units == models.LAYERS + 1


@pytest.mark.parametrize("mode", ["block", "phase", "lazy block"])
@torch.inference_mode()
def test_a_prefix_of_the_blocks_can_be_run(file: Path, mode: str) -> None:
    """As caches do that look at the first blocks, and skip the middle."""
    plain = models.plain(file)
    model, loaded = models.offloaded(file, **MODES[mode])
    latents, timestep, conditions = models.inputs_of()

    def some(dit: Any, runs: list[tuple[int, int | None]]) -> Tensor:
        time, prepared = dit.embed_time(timestep), dit.prepare(conditions)
        stream, context = dit.embed(latents, time, prepared)
        for start, stop in runs:
            stream = run_blocks(dit, stream, context, start, stop)
        out: Tensor = stream.x
        return out

    with loaded.running():
        for runs in ([(0, 2)], [(0, 2), (4, 5)], [(0, None)], [(0, 1)], [(3, 5), (0, 2)]):
            assert same(some(model, runs), some(plain, runs))


@pytest.mark.parametrize("mode", ["block", "half of the blocks", "lazy block", "model"])
@pytest.mark.parametrize("mm_type", ["Default", "int8"])
def test_one_compiled_graph_serves_all_blocks(
    file: Path, mm_type: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    with torch.inference_mode():  # as a runner loads
        model, loaded = models.offloaded(file, mm_type, **MODES[mode])
    compile_blocks(model)
    wanted = models.run(models.plain(file, mm_type), models.inputs_of())
    for _ in range(2):
        with loaded.running():
            for _ in range(2):
                assert tiny.relative_error(models.run(model, models.inputs_of()), wanted) < 1e-2
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_an_error_in_a_block_leaves_the_model_usable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loaded = models.offloaded(file, **BLOCK)
    with loaded.running():
        wanted = models.run(model, models.inputs_of())
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError), loaded.running():
        patched.setattr(model.blocks[2].ffn, "forward", lambda x: 1 / 0)
        models.run(model, models.inputs_of())
    with loaded.running():
        assert same(models.run(model, models.inputs_of()), wanted)


def test_between_requests_the_model_has_its_weights_on_the_host(file: Path) -> None:
    plain = models.plain(file, "int8")
    for mode in ("block", "phase", "model"):
        model, loaded = models.offloaded(file, "int8", **MODES[mode])
        with loaded.running():
            models.run(model, models.inputs_of())
        state = model.state_dict()
        assert state.keys() == plain.state_dict().keys()
        assert all(same(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_what_is_changed_on_the_host_is_what_runs(file: Path) -> None:
    """As a LoRA does that is switched between requests."""
    plain = models.plain(file)
    model, loaded = models.offloaded(file, **BLOCK)
    with torch.inference_mode():
        for dit in (plain, model):
            dit.blocks[1].ffn[0].weight.mul_(1.5)
    with loaded.running():
        assert same(models.run(model, models.inputs_of()), models.run(plain, models.inputs_of()))


@pytest.mark.parametrize("mode", ["block", "phase", "lazy block"])
def test_branches_beside_layers_travel_with_them(file: Path, mode: str) -> None:
    def branch(part: nn.Module) -> None:
        for name, layer in list(part.named_modules()):
            if name.endswith("ffn.0"):
                made = LowRankLinear(layer, 128, 256, 4, device=torch.device("cpu"), dtype=models.DTYPE)
                made.down.copy_(torch.linspace(-1, 1, 4 * 128).view(4, 128))
                made.up.copy_(torch.linspace(-0.1, 0.1, 256 * 4).view(256, 4))
                setattr(part.get_submodule(name.rpartition(".")[0]), "0", made)

    plain = models.plain(file, "int8")
    before = models.run(plain, models.inputs_of())
    branch(plain)
    model, loaded = models.offloaded(file, "int8", ready=branch, **MODES[mode])
    with loaded.running():
        got = models.run(model, models.inputs_of())
    assert same(got, models.run(plain, models.inputs_of())) and not same(got, before)


def test_lazy_load_reads_float_weights_from_the_checkpoint_itself(file: Path) -> None:
    _, loaded = models.offloaded(file, **MODES["lazy block"])
    store = cast(Any, loaded)._store
    # Norms and modulation are kept in float32, which the file does not have.
    assert 0 < store.spilled < 0.03 * file.stat().st_size


def test_image_models_and_mixed_types(tmp_path: Path) -> None:
    file = models.write(tmp_path, "i2v", layers=2)
    types = {"*": "int8", "*.v": "fp8", "blocks.1.*": "Default", "*.ffn.2": "nvfp4"}
    wanted = models.run(models.plain(file, types, "i2v", 2), models.inputs_of("i2v", 2))
    for mode in ("phase", "lazy block"):
        model, loaded = models.offloaded(file, types, "i2v", 2, **MODES[mode])
        with loaded.running():
            assert same(models.run(model, models.inputs_of("i2v", 2)), wanted)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    file = models.write(tmp_path)
    tensors = load_file(file)
    del tensors["blocks.3.ffn.0.weight"]
    save_file(tensors | {"blocks.2.surplus": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"without a place in the model: blocks\.2\.surplus"):
        models.offloaded(file, **BLOCK)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.3\.ffn\.0\.weight"):
        models.offloaded(file, **BLOCK)


@pytest.mark.parametrize("mode", ["model", "block"])
@torch.inference_mode()
def test_parts_that_are_read_once_come_and_go(file: Path, mode: str) -> None:
    latents, timestep, conditions = models.inputs_of()
    plain = models.plain(file)
    model, loaded = models.offloaded(file, **MODES[mode])
    once = OnceParts(model, models.source_of(file), torch.device("cpu"), "here")
    wanted = models.run(plain, models.inputs_of())
    for _ in range(2):
        with once.present():
            time, prepared = model.embed_time(timestep), model.prepare(conditions)
        assert all(parameter.is_meta for parameter in model.text_embedding.parameters())
        with loaded.running():
            stream, context = model.embed(latents, time, prepared)
            assert same(model.head(run_blocks(model, stream, context), context), wanted)
