"""Plans of diffusers pipelines: read from JSON and headers, complete, and with an error for what does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from lightx2v.config.load import load_config
from lightx2v.convert.options import Options
from lightx2v.convert.planning import make_plan
from lightx2v.errors import CheckpointError, ConfigError, UserError
from lightx2v.foreign import PipelinePlan, PipelineRunner, resolve
from lightx2v.foreign.build import empty_model
from lightx2v.foreign.index import ModelPart, read_model, read_pipeline, weights_in
from lightx2v.foreign.layers import quantizable, repeated_blocks
from lightx2v.plan.render import plan_hash
from lightx2v.platform import select_device
from lightx2v.runner import open_plan
from tests.models.tiny_pipelines import WRITERS, clip_config, settings, tiny_t5, tiny_unet, write_sdxl


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def plan(name: str, folder: Path, **overrides: Any) -> PipelinePlan:
    return resolve(load_config(None, settings(name, folder, **overrides)), select_device("cpu"))


@pytest.mark.parametrize("name", WRITERS)
def test_plan_tells_everything_and_reads_no_weights(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr("lightx2v.io.weights.safe_open", None)
    made = plan(name, folders[name], **{"mm_config.mm_type": "int8", "mm_config.weight_auto_quant": True})
    text = made.render()
    assert type(made).__name__ == "PipelinePlan" and made.cls.__name__ in text
    for part in made.components:
        assert part in text and made.components[part].layers
    content = json.loads(json.dumps(made.to_json()))
    assert made.hash == plan_hash(content) == plan(name, folders[name], **{
        "mm_config.mm_type": "int8", "mm_config.weight_auto_quant": True,
    }).hash  # fmt: skip
    assert made.hash != plan(name, folders[name]).hash
    assert made.memory.peak > sum(part.weight_bytes for part in made.components.values())


def test_defaults_are_the_pipelines_own(folders: dict[str, Path]) -> None:
    settings_of = {name: plan(name, folders[name], **{"sampling.steps": None}).request for name in WRITERS}
    sizes = {name: (made.width, made.height, made.frames) for name, made in settings_of.items()}
    assert sizes == {"sdxl": (32, 32, 1), "pixart": (16, 16, 1), "sd3": (32, 32, 1), "cogvideox": (16, 16, 9)}
    assert {name: (made.steps, made.guidance) for name, made in settings_of.items()} == {
        "sdxl": (50, 5.0),
        "pixart": (20, 4.5),
        "sd3": (28, 7.0),
        "cogvideox": (50, 6.0),
    }
    assert settings_of["sd3"].shift == 3.0 and settings_of["sdxl"].solver == "EulerDiscreteScheduler"


def tiny_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 8)
    )


def tiny_z_image() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 8]
    )


@pytest.mark.parametrize(
    ("make", "blocks", "some", "never"),
    [
        (tiny_flux, 2, "single_transformer_blocks.0.proj_out", "norm|embed|^proj_out"),
        (tiny_z_image, 3, "layers.0.feed_forward.w1", "adaLN|embed|final"),
        (tiny_unet, 17, "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj", "time|embed|proj_in"),
        (lambda: CLIPTextModel(clip_config(32)), 3, "encoder.layers.2.self_attn.q_proj", "embed|norm"),
        (lambda: tiny_t5(32), 2, "encoder.block.1.layer.0.SelfAttention.q", "embed|norm|shared"),
    ],
)
def test_layers_that_mm_type_applies_to(make: Callable[[], nn.Module], blocks: int, some: str, never: str) -> None:
    model = make()
    found = quantizable(model)
    assert len(repeated_blocks(model)) == blocks
    assert some in found
    assert not [name for name in found if re.search(never, name)]
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert len(found) > len(linears) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_model_is_what_diffusers_builds_but_for_its_weights(
    name: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    (part,) = read_pipeline(folders[name]).denoisers
    empty = empty_model(part, dtype)
    theirs = part.cls.from_pretrained(part.folder, dtype=dtype)
    assert {key: p.shape for key, p in empty.named_parameters()} == {
        key: p.shape for key, p in theirs.named_parameters()
    }
    assert not empty.training and torch.get_default_dtype() == torch.float32
    persistent = set(theirs.state_dict())
    for key, buffer in theirs.named_buffers():
        if key not in persistent:
            ours = empty.get_buffer(key)
            assert ours.dtype == buffer.dtype and torch.equal(ours, buffer)


def test_rules_and_unmatched_rules(folders: dict[str, Path]) -> None:
    rules = [{"match": "*.ff.*", "mm_type": "Default"}, {"match": "nothing.*", "mm_type": "fp8"}]
    overrides = {"mm_config.mm_type": "int8", "mm_config.weight_auto_quant": True, "mm_config.rules": rules}
    part = plan("sd3", folders["sd3"], **overrides).components["transformer"]
    assert {layer.name.split(".")[2] for layer in part.layers if layer.mm_type == "Default"} == {"ff"}
    assert {layer.mm_type for layer in part.layers} == {"Default", "int8"}
    assert [rule.match for rule in part.unused_rules] == ["nothing.*"]


def test_weights_by_name(tmp_path: Path) -> None:
    assert weights_in(tmp_path) is None and weights_in(tmp_path / "absent") is None
    expected: list[tuple[str, str | None]] = [
        ("model.fp16.safetensors", "fp16"),
        ("pytorch_model.bin", None),
        ("model.safetensors", None),
        ("model.safetensors.index.json", None),
    ]
    for name, variant in expected:  # each is preferred to those before
        (tmp_path / name).touch()
        (tmp_path / "model-00001-of-00002.safetensors").touch()
        assert weights_in(tmp_path) == (tmp_path / name, variant)


def test_a_directory_of_one_variant(tmp_path: Path) -> None:
    folder = write_sdxl(tmp_path / "sdxl")
    StableDiffusionXLPipeline.from_pretrained(folder).save_pretrained(tmp_path / "fp16", variant="fp16")
    files = read_pipeline(tmp_path / "fp16")
    assert files.variant == "fp16"
    made = plan("sdxl", tmp_path / "fp16", **{"sampling.steps": 1})
    assert PipelineRunner(made).run(made.request, quiet=True).shape == (1, 32, 32, 3)


def edited(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


def lose_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)


def bring_code(folder: Path) -> None:
    (folder / "pipeline.py").write_text("raise SystemExit")
    edited(folder, "model_index.json", _class_name=["pipeline", "MyPipeline"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: edited(folder, "model_index.json", _class_name="StableDiffusionXXLPipeline"), "did you mean"),
        (lambda folder: edited(folder, "model_index.json", unet=["my_code", "MyUNet"]), "is a MyUNet of 'my_code'"),
        (bring_code, "code of its own"),
        (lambda folder: edited(folder, "model_index.json", unet=[None, None]), "no transformer or UNet"),
        (lambda folder: edited(folder, "unet/config.json", quantization_config={"quant_method": "torchao"}), "torchao"),
        (lose_weights, "has no weights"),
        (lose_a_tensor, "'conv_in.weight'"),
        (lambda folder: edited(folder, "unet/config.json", cross_attention_dim=48), "has shape"),
    ],
)
def test_a_directory_that_does_not_serve(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = write_sdxl(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        plan("sdxl", folder)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sdxl", {"task": "t2v"}, "makes images"),
        ("cogvideox", {"task": "t2i"}, "makes videos"),
        ("cogvideox", {"task": "i2v"}, "takes no image"),
        ("sdxl", {"task": "i2i"}, "image_path"),
        ("pixart", {"task": "i2i"}, "takes no image"),
        ("sdxl", {"video.frames": 9}, "makes one image"),
        ("sdxl", {"sampling.shift": 2.0}, "has none"),
        ("sd3", {"sampling.solver": "unipc"}, "FlowMatchEulerDiscreteScheduler"),
        ("sdxl", {"text_len": 8}, "max_sequence_length"),
        ("sdxl", {"pipeline_args": {"gidance_rescale": 1}}, "did you mean 'guidance_rescale'"),
        ("sdxl", {"pipeline_args": {"height": 32}}, "set video.height"),
        ("sdxl", {"lora": [{"path": "a.safetensors"}]}, "lora"),
        ("sdxl", {"offload.enabled": True}, "offload.enabled"),
        ("sdxl", {"vae.tae": True}, "vae.tae"),
        ("sdxl", {"mm_config.mm_type": "int8"}, "weight_auto_quant"),
        ("sdxl", {"max_memory_gb": 0.001}, "max_memory_gb"),
        ("sdxl", {"model_path": None}, "model_path"),
    ],
)
def test_settings_that_do_not_fit(name: str, overrides: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        plan(name, folders[name], **overrides)


def test_other_solvers_that_the_pipeline_is_compatible_with(folders: dict[str, Path]) -> None:
    made = plan("sdxl", folders["sdxl"], **{"sampling.solver": "dpm++", "sampling.steps": 2})
    assert made.request.solver == "DPMSolverMultistepScheduler"
    runner = PipelineRunner(made)
    runner.run(made.request, quiet=True)
    assert type(runner.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_one_place_chooses_between_native_models_and_pipelines(folders: dict[str, Path]) -> None:
    assert isinstance(open_plan(load_config(None, settings("sdxl", folders["sdxl"]))), PipelinePlan)
    with pytest.raises(ConfigError, match="model_cls to diffusers"):
        open_plan(load_config(None, {"device": "cpu", "pipeline_args": {"clip_skip": 1}}))
    with pytest.raises(ConfigError, match="did you mean 'diffusers'"):
        open_plan(load_config(None, {"device": "cpu", "model_cls": "difusers"}))


def test_models_and_pipelines_are_told_apart(folders: dict[str, Path]) -> None:
    part = read_model(folders["sdxl"] / "unet")
    assert part.cls is UNet2DConditionModel
    with pytest.raises(CheckpointError, match="no model of diffusers"):
        read_model(folders["sdxl"] / "text_encoder")
    encoder = ModelPart("text_encoder", T5EncoderModel, folders["pixart"] / "text_encoder", {})
    names = dict(empty_model(encoder).named_parameters())
    assert all(parameter.is_meta for name, parameter in names.items() if name.endswith(".q.weight"))


def test_conversions_that_make_no_sense(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"model_type": "diffusers", "quantized": True, "linear_type": "int8"}
    with pytest.raises(ConfigError, match="direction"):
        Options(folders["sdxl"] / "unet", tmp_path, direction="forward", **options)  # type: ignore[arg-type]
    for folder, message in (("text_encoder", "no model of diffusers"), (".", "no config.json")):
        with pytest.raises(CheckpointError, match=message):
            make_plan(Options(folders["sdxl"] / folder, tmp_path, **options))  # type: ignore[arg-type]
