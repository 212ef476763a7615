"""Exports of all five types and their way back; what they hold; models of diffusers and others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.integrations.diffusers import DynamicDiTQuantizer, load_quantized_model
from lightx2v.integrations.linear import MovableLinear
from lightx2v.mm.scheme import parse
from tests.unit.angelslim_nets import BLOCKS, TYPES, Block, Net, relative, seeded


def tiny_wan() -> WanTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=160,
            num_layers=1,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if isinstance(model, WanTransformer3DModel):
        latents, text = torch.randn(2, 4, 2, 6, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
        output: Tensor = model(latents.to(dtype), torch.tensor([500, 500]), text.to(dtype), return_dict=False)[0]
        return output
    made: Tensor = model(torch.randn(3, 7, 200, generator=generator))
    return made


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("quant_type", TYPES)
def test_defect_8_every_export_of_any_module_comes_back(quant_type: str, tmp_path: Path) -> None:
    """AngelSlim exports one of its types, and loads none into a plain module."""
    model, quantizer = seeded(), DynamicDiTQuantizer(quant_type)
    quantizer.export_quantized_weight(model, str(tmp_path))
    assert written(tmp_path) == {"model.safetensors", "fp8_scales.safetensors"}
    for loaded in (
        DynamicDiTQuantizer.load_quantized_model(Net, str(tmp_path)),
        load_quantized_model(Net(), tmp_path),
        load_quantized_model(Net().to("meta"), tmp_path, native_fp8_support=False),
    ):
        assert torch.equal(run(loaded), run(model)) and not loaded.training
        assert all(isinstance(loaded.get_submodule(name), MovableLinear) for name in BLOCKS)


@pytest.mark.parametrize("quant_type", TYPES)
def test_every_export_of_a_diffusers_model_comes_back(quant_type: str, tmp_path: Path) -> None:
    model, quantizer = tiny_wan(), DynamicDiTQuantizer(quant_type)
    quantizer.export_quantized_weight(model, tmp_path)
    assert written(tmp_path) == {"config.json", "diffusion_pytorch_model.safetensors", "fp8_scales.safetensors"}
    loaded = load_quantized_model(WanTransformer3DModel, tmp_path)
    assert isinstance(loaded, WanTransformer3DModel) and torch.equal(run(loaded), run(model))
    # AngelSlim's own way back: codes as numbers, and the scales beside them.
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    DynamicDiTQuantizer(quant_type).convert_linear(again, scale=str(tmp_path))
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("quant_type", TYPES)
def test_the_two_files_hold_what_they_say(quant_type: str, tmp_path: Path) -> None:
    model, quantizer = seeded().bfloat16(), DynamicDiTQuantizer(quant_type)
    quantizer.export_quantized_weight(model, tmp_path)
    whole, scales = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "fp8_scales.safetensors")
    assert set(scales) == {f"{name}.weight_scale" for name in BLOCKS}
    assert all(torch.equal(scales[name], whole[name]) and scales[name].dtype == torch.float32 for name in scales)
    for name, tensor in whole.items():
        if name.removesuffix(".weight") in BLOCKS:
            assert tensor.dtype == torch.float8_e4m3fn
        elif name not in scales:
            assert tensor.dtype == torch.bfloat16
    if "tensor" in quant_type:
        assert {scale.shape for scale in scales.values()} == {torch.Size([])}
    with safe_open(tmp_path / "fp8_scales.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["quantization"])
    assert said["quant_type"] == quant_type and set(said["layers"]) == set(BLOCKS)
    assert {parse(mm_type).weight.granularity for mm_type in said["layers"].values()} == {  # type: ignore[union-attr]
        {"fp8-per-block": "block"}.get(quant_type, "tensor" if "tensor" in quant_type else "channel")
    }


def test_a_text_encoder_of_transformers_comes_back(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        plain = model(tokens).last_hidden_state
        DynamicDiTQuantizer("fp8-per-token", include_patterns=[]).export_quantized_weight(model, tmp_path)
        loaded = load_quantized_model(T5EncoderModel, tmp_path)
        got = loaded(tokens).last_hidden_state
        assert torch.equal(got, model(tokens).last_hidden_state)
    assert relative(got, plain) < 0.1 and sum(isinstance(module, MovableLinear) for module in loaded.modules()) == 14


def test_a_model_that_is_quantized_is_written_as_it_is(tmp_path: Path) -> None:
    model, quantizer = seeded(), DynamicDiTQuantizer("fp8-per-token")
    quantizer.convert_linear(model)
    wanted = run(model)
    DynamicDiTQuantizer("fp8-per-token").export_quantized_weight(model, tmp_path)
    assert torch.equal(run(load_quantized_model(Net, tmp_path)), wanted)
    with pytest.raises(ConfigError, match="quantized already"):
        DynamicDiTQuantizer("fp8-per-block").export_quantized_weight(model, tmp_path)


def test_a_float32_model_of_diffusers_becomes_what_its_pipeline_expects() -> None:
    model, plain = tiny_wan(), tiny_wan()
    DynamicDiTQuantizer().convert_linear(model)
    wanted = {
        name: torch.float32 if "time_embedder" in name or "norm" in name or "scale_shift" in name else torch.bfloat16
        for name, _ in model.named_parameters()
        if "norm_q" not in name and "norm_k" not in name
    }
    assert {name: dict(model.named_parameters())[name].dtype for name in wanted} == wanted
    assert relative(run(model), run(plain, torch.float32)) < 0.05
    assert run(model).dtype == torch.bfloat16
    mixed = tiny_wan().bfloat16()
    mixed.condition_embedder.time_embedder.float()
    DynamicDiTQuantizer().convert_linear(mixed)
    assert mixed.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


def test_a_file_that_says_nothing_is_known_by_its_scales(tmp_path: Path) -> None:
    for quant_type in ("fp8-per-tensor", "fp8-per-token", "fp8-per-block"):
        folder = tmp_path / quant_type
        DynamicDiTQuantizer(quant_type).export_quantized_weight(seeded(), folder)
        bare = load_file(folder / "fp8_scales.safetensors")
        save_file(bare, folder / "fp8_scales.safetensors")
        named = load_quantized_model(Net, folder, quant_type=quant_type)
        assert torch.equal(run(load_quantized_model(Net, folder)), run(named))
    weight_only = load_quantized_model(Net, tmp_path / "fp8-per-tensor", quant_type="fp8-per-tensor-weight-only")
    assert not torch.equal(run(weight_only), run(load_quantized_model(Net, tmp_path / "fp8-per-tensor")))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    DynamicDiTQuantizer("fp8-per-block").export_quantized_weight(seeded(), tmp_path / "export")
    with pytest.raises(CheckpointError, match="no linear layer of the model"):
        load_quantized_model(Block, tmp_path / "export")
    with pytest.raises(CheckpointError, match="shape"):
        load_quantized_model(Net, tmp_path / "export", quant_type="fp8-per-token")
    with pytest.raises(ConfigError, match="unknown quant_type"):
        load_quantized_model(Net, tmp_path / "export", quant_type="fp8-per-tokn")
    with pytest.raises(ConfigError, match="is a str"):
        load_quantized_model("Net", tmp_path / "export")
    with pytest.raises(CheckpointError, match="no weights"):
        load_quantized_model(Net, tmp_path)
    (tmp_path / "plain").mkdir()
    save_file(seeded().state_dict(), tmp_path / "plain" / "model.safetensors")
    with pytest.raises(CheckpointError, match="no quantized layers"):
        load_quantized_model(Net, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no layer of the model is quantized"):
        DynamicDiTQuantizer(include_patterns=["nothing"]).export_quantized_weight(seeded(), tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        DynamicDiTQuantizer().export_quantized_weight(seeded(), tmp_path / "file")
