from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightx2v.errors import CheckpointError
from lightx2v.models.wan.layout import detect

T2V = {"_class_name": "WanModel", "model_type": "t2v", "dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 2}
I2V = {**T2V, "model_type": "i2v", "in_dim": 36}
T5, CLIP = "models_t5_umt5-xxl-enc-bf16", "models_clip_open-clip-xlm-roberta-large-vit-huge-14"


def diffusers_config(original: dict[str, Any]) -> dict[str, Any]:
    image = original["model_type"] == "i2v"
    return {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256,
        "num_layers": 2, "in_channels": original.get("in_dim", 16), "added_kv_proj_dim": 128 if image else None,
    }  # fmt: skip


def make(root: Path, files: dict[str, Any]) -> Path:
    """Files by relative path: a dictionary is written as JSON, None as an empty file."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if content is None else json.dumps(content))
    return root


def original(root: Path, config: dict[str, Any] = T2V, **more: Any) -> Path:
    base = {"config.json": config, f"{T5}.pth": None, "Wan2.1_VAE.pth": None, "google/umt5-xxl/spiece.model": None}
    return make(root, {**base, "diffusion_pytorch_model.safetensors": None, **more})


def diffusers(root: Path, config: dict[str, Any] = T2V, pipeline: str = "WanPipeline", **index: Any) -> Path:
    folders = {f"{name}/config.json": {} for name in ("text_encoder", "tokenizer", "vae")}
    config = diffusers_config(config)
    transformer = {"config.json": config, "diffusion_pytorch_model.safetensors": None}
    return make(
        root,
        {
            "model_index.json": {"_class_name": pipeline, **index},
            **folders,
            **{f"transformer/{name}": content for name, content in transformer.items()},
        },
    )


def test_original(tmp_path: Path) -> None:
    files = detect(original(tmp_path), "t2v")
    assert (files.layout, files.arch.dim, files.model_type) == ("original", 128, "t2v")
    assert files.dit == tmp_path / "diffusion_pytorch_model.safetensors"
    assert files.text_encoder == tmp_path / f"{T5}.pth"
    assert files.tokenizer == tmp_path / "google" / "umt5-xxl"
    assert files.vae == tmp_path / "Wan2.1_VAE.pth"
    assert (files.image_encoder, files.image_processor) == (None, None)


@pytest.mark.parametrize(("task", "config"), [("t2v", T2V), ("i2v", I2V)])
def test_diffusers(task: str, config: dict[str, Any], tmp_path: Path) -> None:
    pipeline = "WanPipeline" if task == "t2v" else "WanImageToVideoPipeline"
    root = diffusers(tmp_path, config, pipeline, transformer_2=[None, None])
    files = detect(make(root, {"image_encoder/config.json": {}, "image_processor/x.json": {}}), task)
    assert (files.layout, files.model_type, files.arch.num_heads) == ("diffusers", task, 2)
    assert files.dit == root / "transformer" / "diffusion_pytorch_model.safetensors"
    assert files.require("image_encoder") == root / "image_encoder"
    assert files.image_processor == root / "image_processor"


@pytest.mark.parametrize("folder", ["", "original/"])
@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ""),
        (["diffusion_pytorch_model.safetensors.index.json"], "diffusion_pytorch_model.safetensors.index.json"),
        (["diffusion_pytorch_model.safetensors", "adapter.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["model_fp8.safetensors", "model.safetensors"], "model.safetensors"),
        (["dit.pth"], "dit.pth"),
    ],
)
def test_weights_of_the_dit(folder: str, names: list[str], wanted: str, tmp_path: Path) -> None:
    others = {} if wanted == "" else {f"{T5}.safetensors": None, "Wan2.1_VAE.safetensors": None}
    make(tmp_path, {"config.json": T2V, **others, **{folder + name: {} for name in names}})
    assert detect(tmp_path, "t2v").dit == tmp_path / folder / wanted


def test_quantized_parts_beside_the_plain_ones_are_not_taken(tmp_path: Path) -> None:
    quantized = {f"fp8/{name}.safetensors": None for name in ("block_0", "non_block")}
    quantized |= {"models_t5_umt5-xxl-enc-fp8.pth": None, "models_clip_vit-huge-14-int8.pth": None}
    files = detect(original(tmp_path, **quantized), "t2v")
    assert files.dit == tmp_path / "diffusion_pytorch_model.safetensors"
    assert files.text_encoder == tmp_path / f"{T5}.pth" and files.image_encoder is None


def test_a_model_with_only_quantized_weights_says_how_to_use_them(tmp_path: Path) -> None:
    root = original(tmp_path, **{"int8/non_block.safetensors": None, "wan_fp8.safetensors": None})
    (root / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        detect(root, "t2v").require("dit")
    assert caught.value.do == "give one of int8, wan_fp8.safetensors as dit_quantized_ckpt"


def test_a_dit_for_each_task(tmp_path: Path) -> None:
    image = {"i2v/config.json": {**I2V, "clip_num_heads": 4}, "i2v/diffusion_pytorch_model.safetensors": None}
    root = original(tmp_path, **image, **{f"{CLIP}.safetensors": None})
    t2v, i2v = detect(root, "t2v"), detect(root, "i2v")
    assert (t2v.model_type, i2v.model_type) == ("t2v", "i2v")
    assert t2v.dit == root / "diffusion_pytorch_model.safetensors"
    assert i2v.dit == root / "i2v" / "diffusion_pytorch_model.safetensors"
    assert t2v.text_encoder == i2v.text_encoder and i2v.image_encoder == root / f"{CLIP}.safetensors"
    assert (t2v.clip_num_heads, i2v.clip_num_heads) == (None, 4)


@pytest.mark.parametrize("build", [original, diffusers])
@pytest.mark.parametrize(("config", "task"), [(T2V, "i2v"), (I2V, "t2v")])
def test_a_dit_of_the_other_task_is_refused(build: Any, config: dict[str, Any], task: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"the task is {task}") as caught:
        detect(build(tmp_path, config), task)
    assert f"--task {config['model_type']}" in caught.value.do


def test_a_missing_part_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks the image encoder: models_clip_\*"):
        detect(original(tmp_path), "t2v").require("image_encoder")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the directory is empty"),
        ({"readme.md": None}, "no config.json; it holds readme.md"),
        ({"model_index.json": {"_class_name": "FluxPipeline"}}, "holds a FluxPipeline, not Wan2.1"),
        (
            {"model_index.json": {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "x"]}},
            "holds Wan2.2",
        ),
        ({"high_noise_model/config.json": T2V, "low_noise_model/config.json": T2V}, "holds Wan2.2"),
        ({"config.json": {**T2V, "_class_name": "VaceWanModel"}}, "config of a VaceWanModel"),
        ({"config.json": {"model_type": "llama", "hidden_size": 64}}, "not the config of a Wan2.1 DiT"),
        ({"config.json": [1]}, "not a JSON object"),
        ({"config.json": None}, "cannot be read as JSON"),
        ({"config.json": {**T2V, "in_dim": 48}}, "in_dim 48 in a model of type t2v"),
        ({"model_index.json": {"_class_name": "WanPipeline"}}, "config.json: is missing"),
    ],
)
def test_other_directories_are_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        detect(make(tmp_path, files), "t2v")


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        detect(tmp_path / "absent", "t2v")
    with pytest.raises(CheckpointError, match="is a file"):
        detect(make(tmp_path, {"model.safetensors": None}) / "model.safetensors", "t2v")
