"""Folders that optimum-quanto and diffusers wrote, loaded into diffusers' own classes, beside what they gave there.

`tests/data/interop/make_quanto.py` made them; `check_quanto.py` beside it holds both packages against each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.integrations import quanto
from tests.data.interop.tiny import wan
from tests.unit.quanto_nets import off

DATA = Path(__file__).parents[1] / "data" / "interop" / "quanto"
VARIANTS = ("float8", "int8", "int4", "int2", "flux-int2", "diffusers-int8", "diffusers-int4")


@torch.no_grad()
def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The model's output for stored inputs."""
    if isinstance(model, WanTransformer3DModel):
        text = F.pad(given["text"], (0, 0, 0, 512 - given["text"].shape[1]))
        output: Tensor = model(given["latents"], given["timestep"], text).sample
        return output
    output = model(
        hidden_states=FluxPipeline._pack_latents(given["latents"][:, :, 0], 1, 4, *given["latents"].shape[3:]),
        encoder_hidden_states=given["text"],
        pooled_projections=given["pooled"],
        timestep=given["timestep"] / 1000,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 3, 4, torch.device("cpu"), torch.float32),
        txt_ids=torch.zeros(given["text"].shape[1], 3),
        guidance=torch.tensor([3.5]),
    ).sample
    return FluxPipeline._unpack_latents(output, 48, 64, 8)[:, :, None]


def inputs() -> dict[str, Tensor]:
    return load_file(DATA / "int8.example.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_folders_give_what_they_give_there(variant: str) -> None:
    example = load_file(DATA / f"{variant}.example.safetensors")
    model: Any = quanto.load_quantized(
        FluxTransformer2DModel if "flux" in variant else WanTransformer3DModel, DATA / variant
    )
    assert off(run(model, example), example["output"]) <= 1e-5
    watched = [key.removesuffix(".weight") for key in example if key.endswith(".weight")]
    for name in watched:
        layer = model.get_submodule(name)
        if name == "proj_out" and variant.startswith("diffusers"):  # which was told to leave it
            assert isinstance(layer, torch.nn.Linear)
            continue
        assert isinstance(layer, quanto.QuantizedLinear) and layer.frozen
        rows = example[f"{name}.weight"]
        torch.testing.assert_close(layer.weight[: rows.shape[0]], rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["float8", "int8", "int4", "int2"])
def test_what_they_wrote_is_written_again(variant: str, tmp_path: Path) -> None:
    model = quanto.load_quantized(WanTransformer3DModel, DATA / variant)
    quanto.save_quantized(model, tmp_path)
    wanted = load_file(DATA / variant / "diffusion_pytorch_model.safetensors")
    got = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        if name.endswith("_shift"):  # divided by the scale and multiplied with it again
            torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(got[name].float(), tensor.float()), name
    said = (DATA / variant / "quantization_map.json").read_text()
    assert quanto.quantization_map(model) == json.loads(said)


@pytest.mark.parametrize("weights", ["float8", "int8", "int4", "int2"])
def test_a_model_of_diffusers_is_saved_and_loaded_by_its_own_methods(weights: str, tmp_path: Path) -> None:
    model: Any = quanto.quantize_diffusers(wan(256), quanto.QuantoConfig(weights, ["proj_out"]))
    model.save_pretrained(tmp_path)
    assert model.config["quantization_config"]["weights_dtype"] == weights
    loaded = quanto.load_quantized(WanTransformer3DModel, tmp_path)
    assert torch.equal(run(loaded, inputs()), run(model, inputs()))
    assert isinstance(loaded.proj_out, torch.nn.Linear)


def quantized(entries: list[str] | None) -> set[str]:
    model: Any = quanto.quantize_diffusers(wan(), quanto.QuantoConfig("int8", entries))
    assert ("quantization_config" in model.config) is all(map(local, entries or []))
    return set(quanto.quantization_map(model))


def local(entry: str) -> bool:
    return "." not in entry and "*" not in entry


def test_exclusions_are_local_names_or_globs_on_paths() -> None:
    everything = quantized(None)
    assert everything - quantized(["to_q"]) == {"blocks.0.attn1.to_q", "blocks.0.attn2.to_q"}
    assert everything - quantized(["attn1"]) == set()  # a module with children excludes nothing, as in diffusers
    assert everything - quantized(["blocks.0.attn1.*"]) == {name for name in everything if ".attn1." in name}
    assert everything - quantized(["*attn2.to_[kv]"]) == {"blocks.0.attn2.to_k", "blocks.0.attn2.to_v"}
    assert "condition_embedder.time_embedder.linear_1" in everything


def test_settings_that_diffusers_refuses_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights_dtype"):
        quanto.QuantoConfig("int3")
    with pytest.raises(ConfigError, match="a list of names"):
        quanto.QuantoConfig("int8", "proj_out")


def test_folders_that_do_not_say_what_they_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        quanto.load_quantized(WanTransformer3DModel, tmp_path)
    wan().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not say which layers"):
        quanto.load_quantized(WanTransformer3DModel, tmp_path)
    with pytest.raises(CheckpointError, match="no layer of the model is quantized"):
        quanto.save_quantized(wan(), tmp_path)
    thawed = wan()
    quanto.quantize(thawed, weights="qint8")
    with pytest.raises(CheckpointError, match="is not frozen"):
        quanto.save_quantized(thawed, tmp_path)


def test_a_model_from_a_single_file_is_quantized(tmp_path: Path) -> None:
    source = wan(256)
    source.save_pretrained(tmp_path)
    model: Any = WanTransformer3DModel.from_single_file(
        str(tmp_path / "diffusion_pytorch_model.safetensors"), config=str(tmp_path), torch_dtype=torch.bfloat16
    )
    quanto.quantize_diffusers(model, quanto.QuantoConfig("int8"))
    assert isinstance(model.blocks[0].ffn.net[2], quanto.QuantizedLinear)
    given = {name: tensor.bfloat16() for name, tensor in inputs().items()}
    assert off(run(model, given), run(source, inputs())) < 0.05
