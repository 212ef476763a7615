from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from loguru import logger
from transformers import UMT5EncoderModel

from lightx2v.encoders import umt5
from lightx2v.encoders.keymap import T5
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from tests.models import tiny_encoders as tiny

CPU = torch.device("cpu")
PROMPTS = ["a red circle on a black background moves left", "Fish &amp;amp; chips ", ""]


@pytest.fixture(scope="module")
def model() -> UMT5EncoderModel:
    return tiny.tiny_t5()


@pytest.fixture(scope="module", params=["original", "diffusers"])
def files(request: pytest.FixtureRequest, model: UMT5EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return tiny.write_t5(model, tmp_path_factory.mktemp(request.param), request.param)


def load(files: tuple, dtype: torch.dtype = torch.float32, **options) -> umt5.TextEncoder:
    return umt5.load_text_encoder(*files, device=CPU, dtype=dtype, **options)


def diffusers_embeddings(model: UMT5EncoderModel, prompts: list[str], text_len: int) -> torch.Tensor:
    pipeline = WanPipeline(tiny.tiny_tokenizer(), model, None, None)
    with torch.no_grad():
        return pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=text_len, device=CPU)


def test_equals_the_pipeline_of_diffusers(files: tuple, model: UMT5EncoderModel) -> None:
    states, mask = load(files).encode(PROMPTS, text_len=24)
    torch.testing.assert_close(states, diffusers_embeddings(model, PROMPTS, 24), atol=1e-5, rtol=1e-5)
    assert mask.dtype == torch.bool and mask.shape == (3, 24)
    assert mask[2].tolist() == [True] + [False] * 23  # an empty prompt still has its end token
    assert not states[~mask].any() and states[mask].any(dim=-1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_transformers(
    files: tuple, model: UMT5EncoderModel, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights, _ = tiny.write_t5(model, tmp_path, "diffusers")
    expected = diffusers_embeddings(UMT5EncoderModel.from_pretrained(weights, dtype=dtype), PROMPTS, 24)
    states, _ = load(files, dtype).encode(PROMPTS, text_len=24)
    assert states.dtype == dtype
    # Not bit for bit: without the padding, attention adds up in another order.
    assert (states.float() - expected.float()).norm() < 2 * torch.finfo(dtype).eps * expected.float().norm()


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(files: tuple, model: UMT5EncoderModel) -> None:
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    states, mask = load(files).encode(PROMPTS[:2], text_len=6)
    logger.remove(sink)
    torch.testing.assert_close(states, diffusers_embeddings(model, PROMPTS[:2], 6), atol=1e-5, rtol=1e-5)
    assert mask.all()
    assert len(messages) == 2 and "only the first 6 count: a red circle" in messages[0]


def test_linear_shapes_have_original_names(files: tuple) -> None:
    shapes = umt5.linear_shapes(Checkpoint.open(files[0]))
    assert len(shapes) == 14
    assert shapes["blocks.1.attn.q"] == (48, 32) and shapes["blocks.1.attn.o"] == (32, 48)
    assert shapes["blocks.0.ffn.gate.0"] == shapes["blocks.0.ffn.fc1"] == (40, 32)
    assert shapes["blocks.0.ffn.fc2"] == (32, 40)


def test_names_go_both_ways(model: UMT5EncoderModel) -> None:
    for name in tiny.t5_original(model):
        (target,) = T5.to_module(name)
        assert T5.to_original(target) == name
    assert T5.to_original("block.7.layer.1.DenseReluDense.wo.weight_scale") == "blocks.7.ffn.fc2.weight_scale"


def test_what_is_wrong_with_a_file_is_told(model: UMT5EncoderModel, tmp_path: Path) -> None:
    weights, tokenizer = tiny.write_t5(model, tmp_path, "original")
    state = tiny.t5_original(model)
    for change, message in (
        ({"blocks.1.norm2.weight": None}, "blocks.1.norm2.weight"),
        ({"blocks.1.attn.k.weight": None}, "blocks.1.attn.k.weight"),
        ({"blocks.0.attn.extra.weight": torch.zeros(2)}, "blocks.0.attn.extra.weight"),
        ({"blocks.0.attn.q.weight_scale": torch.zeros(48, 1)}, "name its quantization scheme"),
    ):
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, weights)
        with pytest.raises(CheckpointError, match=message):
            load((weights, tokenizer))
    torch.save(tiny.vae_original(tiny.tiny_vae(1)), weights)
    with pytest.raises(CheckpointError, match=r"blocks\.N|config\.json"):
        load((weights, tokenizer))
    torch.save(state, weights)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load((weights, tmp_path / "nowhere"))
