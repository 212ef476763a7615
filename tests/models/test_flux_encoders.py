from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

from lightx2v.encoders import clip_text, t5
from lightx2v.encoders.keymap import CLIP_TEXT, T5_V1_1
from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.platform import select_device
from tests.models import tiny_flux_parts as tiny

CPU = torch.device("cpu")
PROMPTS = ["a red circle on black", "green", ""]
LAYOUTS = ("diffusers", "original")


@pytest.fixture(scope="module")
def t5_model() -> T5EncoderModel:
    return tiny.tiny_t5()


@pytest.fixture(scope="module")
def clip_model() -> CLIPTextModel:
    return tiny.tiny_clip_text()


@pytest.fixture(scope="module", params=LAYOUTS)
def t5_files(request: pytest.FixtureRequest, t5_model: T5EncoderModel, tmp_path_factory: pytest.TempPathFactory):
    return tiny.write_t5(t5_model, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=LAYOUTS)
def clip_files(request: pytest.FixtureRequest, clip_model: CLIPTextModel, tmp_path_factory: pytest.TempPathFactory):
    return tiny.write_clip_text(clip_model, tmp_path_factory.mktemp(request.param), request.param)


def pipeline(t5_model: T5EncoderModel, clip_model: CLIPTextModel) -> FluxPipeline:
    return FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=clip_model,
        tokenizer=tiny.tiny_clip_tokenizer(),
        text_encoder_2=t5_model,
        tokenizer_2=tiny.tiny_t5_tokenizer(),
    )


@torch.no_grad()
def test_both_equal_the_pipeline_of_diffusers(
    t5_files: tuple, clip_files: tuple, t5_model: T5EncoderModel, clip_model: CLIPTextModel
) -> None:
    text, pooled, _ = pipeline(t5_model, clip_model).encode_prompt(PROMPTS, None, max_sequence_length=20, device=CPU)
    states = t5.load_t5(*t5_files, device=CPU, dtype=torch.float32).encode(PROMPTS, 20)
    vector = clip_text.load_clip_text(*clip_files, device=CPU, dtype=torch.float32).encode(PROMPTS)
    assert states.shape == (3, 20, tiny.TEXT_DIM) and vector.shape == (3, tiny.POOLED_DIM)
    torch.testing.assert_close(states, text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vector, pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_transformers(t5_files: tuple, t5_model: T5EncoderModel, dtype: torch.dtype) -> None:
    encoder = t5.load_t5(*t5_files, device=CPU, dtype=dtype)
    states = encoder.encode(PROMPTS, 20)
    with torch.no_grad():
        exact = t5.load_t5(*t5_files, device=CPU, dtype=torch.float32).encode(PROMPTS, 20)
    assert states.dtype == dtype
    assert (states.float() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


def test_the_padding_counts_as_text(t5_files: tuple) -> None:
    encoder = t5.load_t5(*t5_files, device=CPU, dtype=torch.float32)
    short, long = encoder.encode(PROMPTS[:1], 20), encoder.encode(PROMPTS[:1], 24)
    assert short.abs().sum(-1).all() and not torch.allclose(short, long[:, :20])


def test_only_t5_warns_of_a_prompt_that_is_too_long(t5_files: tuple, clip_files: tuple) -> None:
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    long = ["a red circle on a green square " * 4]
    assert t5.load_t5(*t5_files, device=CPU, dtype=torch.float32).encode(long, 8).shape[1] == 8
    clip_text.load_clip_text(*clip_files, device=CPU, dtype=torch.float32).encode(long)
    logger.remove(sink)
    assert len(messages) == 1 and "only the first 8 count: a red circle" in messages[0]


def prefixed(path: Path, folder: Path, *prefixes: str) -> Path:
    """The tensors of `path` once more, in one file for several models."""
    states = {prefix: load_file(path) for prefix in prefixes[:1]}
    tensors = {f"{prefix}{name}": tensor for prefix, state in states.items() for name, tensor in state.items()}
    others = {f"{prefix}other.weight": torch.zeros(2) for prefix in prefixes[1:]}
    save_file({**tensors, **others}, folder / "all.safetensors")
    return folder / "all.safetensors"


def test_a_file_with_several_models(t5_model: T5EncoderModel, clip_model: CLIPTextModel, tmp_path: Path) -> None:
    weights, tokenizer = tiny.write_t5(t5_model, tmp_path, "original")
    whole = prefixed(weights, tmp_path, t5.PREFIX, clip_text.PREFIX, "vae.", "model.diffusion_model.")
    options = {"device": CPU, "dtype": torch.float32}
    assert torch.equal(
        t5.load_t5(whole, tokenizer, **options).encode(PROMPTS, 9),
        t5.load_t5(weights, tokenizer, **options).encode(PROMPTS, 9),
    )
    weights, tokenizer = tiny.write_clip_text(clip_model, tmp_path, "original")
    whole = prefixed(weights, tmp_path, clip_text.PREFIX, t5.PREFIX)
    assert torch.equal(
        clip_text.load_clip_text(whole, tokenizer, **options).encode(PROMPTS),
        clip_text.load_clip_text(weights, tokenizer, **options).encode(PROMPTS),
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_8_bit_files_are_read_as_floats(t5_model: T5EncoderModel, tmp_path: Path, scaled: bool) -> None:
    weights, tokenizer = tiny.write_t5(t5_model, tmp_path, "original")
    state, rounded = load_file(weights), {}
    for name, tensor in list(state.items()):
        scale = tensor.abs().max() / 448 if scaled and tensor.ndim == 2 else torch.tensor(1.0)
        state[name] = (tensor / scale).to(torch.float8_e4m3fn)
        rounded[name] = state[name].float() * scale
        if scaled and tensor.ndim == 2:
            state[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    save_file(rounded, tmp_path / "rounded.safetensors")
    save_file({**state, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, weights)
    options = {"device": CPU, "dtype": torch.bfloat16}
    got = t5.load_t5(weights, tokenizer, **options).encode(PROMPTS, 9)
    assert torch.equal(got, t5.load_t5(tmp_path / "rounded.safetensors", tokenizer, **options).encode(PROMPTS, 9))


@pytest.mark.parametrize("auto", [False, True])
def test_linears_can_be_quantized(tmp_path: Path, auto: bool) -> None:
    weights, tokenizer = tiny.write_t5(tiny.tiny_t5(scale=0.1), tmp_path, "original")
    shapes = t5.linear_shapes(Checkpoint.open(weights))
    assert len(shapes) == 14 and shapes["encoder.block.1.layer.0.SelfAttention.o"] == (tiny.TEXT_DIM, 48)
    device, scheme = select_device("cpu"), parse("fp8-pertensor")
    plans = {
        name: plan_layer(name, "fp8-pertensor", scheme, n, k, device=device, fallback=True)
        for name, (n, k) in shapes.items()
    }
    exact = t5.load_t5(weights, tokenizer, device=CPU, dtype=torch.float32).encode(PROMPTS, 9)
    if not auto:
        state = load_file(weights)
        for name in shapes:
            scale = state[f"{name}.weight"].abs().max() / 448
            state[f"{name}.weight"] = (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
            state[f"{name}.scale_weight"] = scale
        save_file(state, weights)
    encoder = t5.load_t5(weights, tokenizer, device=CPU, dtype=torch.float32, quant_plans=plans, auto_quant=auto)
    assert 0 < (encoder.encode(PROMPTS, 9) - exact).norm() < 0.2 * exact.norm()


def test_names_go_both_ways(t5_model: T5EncoderModel, clip_model: CLIPTextModel) -> None:
    for names, state in ((T5_V1_1, t5_model.state_dict()), (CLIP_TEXT, tiny.clip_text_original(clip_model))):
        for name in state:
            if name.startswith(("text_projection", "logit_scale")) or name.endswith("position_ids"):
                continue
            if name != "encoder.embed_tokens.weight":
                (target,) = names.to_module(name)
                assert names.to_original(target) == name


def test_what_is_wrong_with_a_file_is_told(t5_model: T5EncoderModel, clip_model: CLIPTextModel, tmp_path: Path) -> None:
    weights, tokenizer = tiny.write_t5(t5_model, tmp_path, "original")
    state = load_file(weights)
    options = {"device": CPU, "dtype": torch.float32}
    for name in ("shared.weight", "encoder.block.1.layer.0.layer_norm.weight", "encoder.final_layer_norm.weight"):
        save_file({k: v for k, v in state.items() if k not in (name, "encoder.embed_tokens.weight")}, weights)
        with pytest.raises(CheckpointError, match=name):
            t5.load_t5(weights, tokenizer, **options)
    save_file(tiny.clip_text_original(clip_model), weights)
    with pytest.raises(CheckpointError, match=r"encoder\.block\.N"):
        t5.load_t5(weights, tokenizer, **options)
    save_file(state, weights)
    with pytest.raises(CheckpointError, match=r"text_model\.encoder\.layers\.N"):
        clip_text.load_clip_text(weights, tokenizer, **options)
    with pytest.raises(CheckpointError, match="tokenizer_2"):
        t5.load_t5(weights, tmp_path / "nowhere", **options)
