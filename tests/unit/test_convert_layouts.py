"""The converter against the models of diffusers and transformers, which read and wrote the other layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from lightx2v.io.weights import Checkpoint
from lightx2v.models.wan.arch import WanArch
from tests.models.tiny_checkpoints import diffusers_twin, original_config, tiny_dit, write_dit
from tests.models.tiny_encoders import t5_original, tiny_t5, write_t5
from tests.unit.convert_data import run


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_diffusers_loads_what_was_converted_for_it(tmp_path: Path, task: str) -> None:
    dit = tiny_dit(task)
    source = write_dit(dit, tmp_path / "model", "original")
    assert run(source, tmp_path / "out", "--direction", "forward", "--chunk-size", "20") == 0
    loaded, report = WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wanted = diffusers_twin(dit).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.in_channels == dit.arch.in_dim and loaded.config.image_dim == wanted_image(dit.arch)


def wanted_image(arch: WanArch) -> int | None:
    return arch.image_dim if arch.model_type == "i2v" else None


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_what_diffusers_wrote_becomes_original(tmp_path: Path, task: str) -> None:
    dit = tiny_dit(task)
    root = write_dit(dit, tmp_path / "pipeline", "diffusers")
    assert run(root, tmp_path / "out", "--direction", "backward", "--save_by_block") == 0
    wanted = dit.state_dict()
    result = dict(Checkpoint.open(tmp_path / "out").stream())
    assert result.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in result.items())
    described = WanArch.from_config(original_config(dit.arch))
    if task == "t2v":  # diffusers does not say what a model without image encoder would take
        described = replace(described, image_dim=1280)
    assert WanArch.from_config(json.loads((tmp_path / "out" / "config.json").read_text())) == described


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_text_encoders_of_both_layouts_have_the_same_codes(tmp_path: Path, layout: str) -> None:
    model = tiny_t5()
    (tmp_path / "model").mkdir()
    file, _ = write_t5(model, tmp_path / "model", layout)
    flags = ("-t", "wan_t5", "--quantized", "--linear_type", "int8", "--single_file", "--verify")
    assert run(file, tmp_path / "out", *flags) == 0
    result = load_file(tmp_path / "out" / "converted.safetensors")
    wanted = t5_original(model)
    assert {name for name in result if not name.endswith("_scale")} == wanted.keys()
    for name, tensor in wanted.items():
        if result[name].dtype == torch.int8:
            assert name.split(".")[2] in ("attn", "ffn")
            restored = result[name] * result[f"{name}_scale"]
            assert (restored - tensor).norm() < 0.01 * tensor.norm()
        else:
            assert torch.equal(result[name], tensor.float())


def test_a_text_encoder_goes_back_to_transformers(tmp_path: Path) -> None:
    model = tiny_t5()
    (tmp_path / "model").mkdir()
    file, _ = write_t5(model, tmp_path / "model", "original")
    assert run(file, tmp_path / "out", "-t", "wan_t5", "-d", "forward", "--single_file") == 0
    result = load_file(tmp_path / "out" / "converted.safetensors")
    missing, unexpected = model.load_state_dict(result, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
