from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from lightx2v.encoders import clip_vision
from lightx2v.encoders.keymap import CLIP
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from tests.models import tiny_encoders as tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> CLIPVisionModel:
    return tiny.tiny_clip()


@pytest.fixture(scope="module", params=["original", "diffusers"])
def files(request: pytest.FixtureRequest, model: CLIPVisionModel, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return tiny.write_clip(model, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(params=[(50, 41), (20, 64)])
def picture(request: pytest.FixtureRequest) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*request.param, 3), dtype=np.uint8))


def load(files: tuple, **options) -> clip_vision.ImageEncoder:
    return clip_vision.load_clip(*files, device=CPU, dtype=torch.float32, **options)


def test_equals_the_pipeline_of_diffusers(files: tuple, model: CLIPVisionModel, picture: Image.Image) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pipeline = WanImageToVideoPipeline(None, None, None, None, processor, model)
    with torch.no_grad():
        expected = pipeline.encode_image(picture, CPU)
    states = load(files).encode([picture])
    assert states.shape == (1, 5, 160)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_the_last_block_is_not_kept(files: tuple) -> None:
    assert len(load(files).module.encoder.layers) == 2


def test_linear_shapes_have_original_names(files: tuple) -> None:
    shapes = clip_vision.linear_shapes(Checkpoint.open(files[0]))
    assert len(shapes) == 8
    assert shapes["visual.transformer.1.attn.to_qkv"] == (480, 160)
    assert shapes["visual.transformer.1.attn.proj"] == (160, 160)
    assert shapes["visual.transformer.0.mlp.0"] == (64, 160) and shapes["visual.transformer.0.mlp.2"] == (160, 64)


def test_names_go_both_ways(model: CLIPVisionModel) -> None:
    named = {n for n in tiny.clip_original(model) if n.startswith("visual.") and n != "visual.head"}
    targets = {target: name for name in named for target in CLIP.to_module(name)}
    assert targets.keys() == dict(model.named_parameters()).keys()
    assert all(CLIP.to_original(target) == name for target, name in targets.items())


def test_older_names_of_transformers_are_read(model: CLIPVisionModel, picture: Image.Image, tmp_path: Path) -> None:
    weights, processor = tiny.write_clip(model, tmp_path, "diffusers")
    file = weights / "model.safetensors"
    expected = load((weights, processor)).encode([picture])
    save_file({f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(load((weights, processor)).encode([picture]), expected)


def test_the_number_of_heads(tmp_path: Path) -> None:
    files = tiny.write_clip(tiny.tiny_clip(width=96, heads=4), tmp_path, "original")
    with pytest.raises(CheckpointError, match="clip_num_heads"):
        load(files)
    assert load(files, num_heads=4).module.config.num_attention_heads == 4


def test_what_is_wrong_with_a_file_is_told(model: CLIPVisionModel, tmp_path: Path) -> None:
    weights, _ = tiny.write_clip(model, tmp_path, "original")
    state = tiny.clip_original(model)
    for name in ("visual.pos_embedding", "visual.transformer.1.attn.to_qkv.bias", "visual.pre_norm.weight"):
        torch.save({k: v for k, v in state.items() if k != name}, weights)
        with pytest.raises(CheckpointError, match=name):
            load((weights, None))
    torch.save(state, weights)
    with pytest.raises(CheckpointError, match="image processor"):
        load((weights, tmp_path / "nowhere"))
