from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightx2v.errors import CheckpointError
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.layout import detect
from lightx2v.models.flux.spec import FLUX
from tests.models import tiny_flux as tiny

CONFIG = {
    "_class_name": "FluxTransformer2DModel", "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19,
    "num_single_layers": 38, "in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True,
}  # fmt: skip
FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")


def make(root: Path, files: dict[str, Any]) -> Path:
    """Files by relative path: a dictionary is written as JSON, None as an empty file."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if content is None else json.dumps(content))
    return root


def diffusers(root: Path, pipeline: str = "FluxPipeline", config: dict[str, Any] = CONFIG, **more: Any) -> Path:
    folders = {f"{name}/config.json": {} for name in FOLDERS}
    transformer = {"transformer/config.json": config, "transformer/diffusion_pytorch_model.safetensors": None}
    return make(root, {"model_index.json": {"_class_name": pipeline}, **folders, **transformer, **more})


def original(root: Path, name: str = "flux1-dev.safetensors", guidance: bool = True) -> Path:
    tiny.write_dit(tiny.tiny_transformer(guidance), root, "original", name)
    files = {"tokenizer/vocab.json": {}, "tokenizer_2/spiece.model": None}
    return make(root, {**files, "ae.safetensors": None, "clip_l.safetensors": None, "t5xxl_fp16.safetensors": None})


@pytest.mark.parametrize(
    ("pipeline", "guidance", "variant"),
    [
        ("FluxPipeline", True, "dev"),
        ("FluxPipeline", False, "schnell"),
        ("FluxImg2ImgPipeline", True, "dev"),
        ("FluxKontextPipeline", True, "kontext"),
    ],
)
def test_diffusers(pipeline: str, guidance: bool, variant: str, tmp_path: Path) -> None:
    root = diffusers(tmp_path, pipeline, {**CONFIG, "guidance_embeds": guidance})
    files = detect(root, "t2i")
    assert (files.layout, files.variant, files.arch) == ("diffusers", variant, FluxArch(guidance=guidance))
    assert files.dit == root / "transformer" / "diffusion_pytorch_model.safetensors"
    assert [files.require(part) for part in FOLDERS] == [root / name for name in FOLDERS]  # type: ignore[arg-type]
    assert files.arch.text_len == (512 if guidance else 256)


@pytest.mark.parametrize(
    ("name", "guidance", "variant"),
    [
        ("flux1-dev.safetensors", True, "dev"),
        ("flux1-schnell.safetensors", False, "schnell"),
        ("flux1-kontext-dev.safetensors", True, "kontext"),
        ("flux1-dev-fp8.safetensors", True, "dev"),
        ("my-model.safetensors", True, "dev"),
    ],
)
def test_original(name: str, guidance: bool, variant: str, tmp_path: Path) -> None:
    root = original(tmp_path, name, guidance)
    for path in (root, root / name):
        files = detect(path, "t2i")
        assert (files.root, files.layout, files.variant) == (root, "original", variant)
        assert files.dit == root / name
        assert files.arch == tiny.tiny_dit(guidance).arch
        assert files.vae == root / "ae.safetensors" and files.text_encoder == root / "clip_l.safetensors"
        assert files.text_encoder_2 == root / "t5xxl_fp16.safetensors"
        assert files.tokenizer_2 == root / "tokenizer_2"


def test_folders_of_diffusers_beside_original_files(tmp_path: Path) -> None:
    """As the published directories are, without the transformer's folder."""
    root = original(tmp_path)
    for name in ("ae.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors"):
        (root / name).unlink()
    make(root, {**{f"{name}/config.json": {} for name in FOLDERS}, "model_index.json": {"_class_name": "FluxPipeline"}})
    files = detect(root, "t2i")
    assert (files.layout, files.dit) == ("original", root / "flux1-dev.safetensors")
    assert files.vae == root / "vae"


def test_whole_files_are_preferred_to_quantized_ones(tmp_path: Path) -> None:
    root = original(tmp_path)
    others = ("flux1-dev-fp8.safetensors", "flux1-dev-Q4_K_S.gguf", "t5xxl_fp8_e4m3fn_scaled.safetensors")
    make(root, {name: None for name in others})
    files = detect(root, "t2i")
    assert files.dit == root / "flux1-dev.safetensors" and files.text_encoder_2 == root / "t5xxl_fp16.safetensors"
    (root / "t5xxl_fp16.safetensors").unlink()
    assert detect(root, "t2i").text_encoder_2 == root / "t5xxl_fp8_e4m3fn_scaled.safetensors"


def test_shards(tmp_path: Path) -> None:
    root = diffusers(tmp_path, **{"transformer/diffusion_pytorch_model.safetensors.index.json": {"weight_map": {}}})
    assert detect(root, "t2i").dit == root / "transformer" / "diffusion_pytorch_model.safetensors.index.json"


def test_the_schedule(tmp_path: Path) -> None:
    written = {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.3}
    root = diffusers(tmp_path / "a", **{"scheduler/scheduler_config.json": written})
    assert detect(root, "t2i").scheduler == written
    dev = detect(original(tmp_path / "b"), "t2i").scheduler
    assert dev["use_dynamic_shifting"] and (dev["base_shift"], dev["max_shift"]) == (0.5, 1.15)
    assert detect(original(tmp_path / "c", guidance=False), "t2i").scheduler == {}


def test_defaults_follow_the_variant(tmp_path: Path) -> None:
    dev = FLUX.load_defaults(detect(original(tmp_path / "a"), "t2i"), "t2i")
    assert (dev["steps"], dev["guidance"], dev["shift"], dev["height"]) == (28, 3.5, None, 1024)
    kontext = FLUX.load_defaults(detect(original(tmp_path / "b", "flux1-kontext-dev.safetensors"), "i2i"), "i2i")
    assert kontext["guidance"] == 2.5
    schnell = original(tmp_path / "c", guidance=False)
    assert FLUX.load_defaults(detect(schnell, "t2i"), "t2i")["steps"] == 4
    make(schnell, {"lightx2v_defaults.json": {"t2i": {"steps": 2, "shift": 1.5}}})
    shipped = FLUX.load_defaults(detect(schnell, "t2i"), "t2i")
    assert (shipped["steps"], shipped["shift"]) == (2, 1.5)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        detect(tmp_path / "nowhere", "t2i")
    with pytest.raises(CheckpointError, match="empty"):
        detect(tmp_path, "t2i")
    make(tmp_path, {"readme.txt": None})
    with pytest.raises(CheckpointError, match=r"flux1-\*.safetensors; it holds readme.txt"):
        detect(tmp_path, "t2i")
    with pytest.raises(CheckpointError, match=r"ending '\.txt'"):
        detect(tmp_path / "readme.txt", "t2i")
    root = original(tmp_path / "model")
    for name, part, message in (
        ("ae.safetensors", "vae", "ae.safetensors"),
        ("t5xxl_fp16.safetensors", "text_encoder_2", "T5"),
        ("clip_l.safetensors", "text_encoder", "CLIP"),
    ):
        (root / name).unlink()
        with pytest.raises(CheckpointError, match=message):
            detect(root, "t2i").require(part)  # type: ignore[arg-type]
    save_file({"a.weight": torch.zeros(2)}, root / "other.safetensors")
    save_file({"a.weight": torch.zeros(2)}, root / "another.safetensors")
    (root / "flux1-dev.safetensors").unlink()
    with pytest.raises(CheckpointError, match="any of these could be the DiT: another"):
        detect(root, "t2i")
    with pytest.raises(CheckpointError, match=r"not a FLUX\.1 DiT: tensor 'img_in\.weight' is missing"):
        detect(root / "other.safetensors", "t2i")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel, not FLUX"),
        ({"in_channels": 384, "out_channels": 64}, "FLUX.1 Fill"),
        ({"in_channels": 128, "out_channels": 64}, "Canny or Depth"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_attention_heads": "24"}, "positive whole number"),
        ({"axes_dims_rope": [16, 56, 57]}, "add up to the width of a head"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"num_single_layers": None}, "num_single_layers is None"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        detect(diffusers(tmp_path, config={**CONFIG, **change}), "t2i")


def test_other_pipelines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a WanPipeline, not FLUX"):
        detect(diffusers(tmp_path, "WanPipeline"), "t2i")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        detect(tmp_path, "t2i")
    make(tmp_path, {"model_index.json": {"_class_name": "FluxPipeline"}})
    (tmp_path / "transformer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        detect(tmp_path, "t2i")
