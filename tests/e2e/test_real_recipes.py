"""The shipped configurations for real weights, resolved against files with real headers and no data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from lightx2v.bench.work import arch_of
from lightx2v.config.load import load_config
from lightx2v.mm import triton as triton_library
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from lightx2v.plan import resolve
from lightx2v.platform import probe, select_device
from tests.models.absent_gpu import GPU
from tests.models.tiny_checkpoints import original_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "lightx2v" / "assets" / "tiny-wan"
FOLDERS = ("attention", "caching", "combined", "fewer_steps", "offload")
CONFIGS = sorted(path for folder in FOLDERS for path in (ROOT / "configs" / folder).glob("*.json"))


def write_holes(path: Path, arch: WanArch) -> None:
    """A safetensors file of a DiT in bfloat16 whose data is one hole: it takes no room on the disk."""
    with torch.device("meta"):
        shapes = {name: list(parameter.shape) for name, parameter in WanDiT(arch).named_parameters()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By task: a T2V of 1.3B and an I2V of 14B, with the other parts of tiny-wan."""
    base = tmp_path_factory.mktemp("models")
    image = replace(arch_of("wan-14b"), model_type="i2v", in_dim=36)
    for task, arch in (("t2v", arch_of("wan-1.3b")), ("i2v", image)):
        shutil.copytree(
            TINY, base / task, ignore=shutil.ignore_patterns("diffusion*", "i2v", "config.json", "lightx2v*")
        )
        (base / task / "config.json").write_text(json.dumps({**original_config(arch), "clip_num_heads": 2}))
        write_holes(base / task / "diffusion_pytorch_model.safetensors", arch)
    return {task: base / task for task in ("t2v", "i2v")}


@pytest.mark.skipif(probe("triton").version is None, reason=f"triton is {probe('triton').reason}")
@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "hopper").glob("*.json")), ids=lambda path: path.stem)
def test_config_for_hopper_resolves_on_a_gpu(
    path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_library, "trial", lambda *_: None)
    task = json.loads(path.read_text())["task"]
    plan = resolve(load_config(str(path), {"model_path": str(models[task])}), GPU)
    layers = plan.components["dit"].layers
    assert layers and {layer.library for layer in layers} == {"triton"} and plan.config.graphs
    assert set(plan.attention.functions) > {"triton_8bit"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_resolves(path: Path, models: dict[str, Path]) -> None:
    task = json.loads(path.read_text())["task"]
    device = replace(select_device("cpu"), free_memory=2**40)
    plan = resolve(load_config(str(path), {"model_path": str(models[task]), "device": "cpu"}), device)
    assert plan.request.task == task and plan.render()
    assert (plan.cache is not None) == (path.parent.name in ("caching", "combined"))
    assert plan.offload.settings.enabled == (path.parent.name in ("offload", "combined") and "auto" not in path.stem)
    assert len(set(plan.attention.functions)) == (2 if path.parent.name in ("attention", "combined") else 1)
    if path.stem.endswith("4step"):
        assert (plan.request.steps, plan.request.solver, plan.request.cfg) == (4, "euler", False)
