from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.models.spec import DEFAULTS_FILE, FAMILIES
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.spec import WAN

T2V_14B = {
    "dim": 5120,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_dim": 16,
    "num_heads": 40,
    "num_layers": 40,
    "out_dim": 16,
}
I2V_DIFFUSERS = {
    "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": 5120, "attention_head_dim": 128, "eps": 1e-06,
    "cross_attn_norm": True, "ffn_dim": 13824, "freq_dim": 256, "image_dim": 1280, "in_channels": 36,
    "num_attention_heads": 40, "num_layers": 40, "out_channels": 16, "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip


def test_the_family_is_found_by_its_name() -> None:
    assert FAMILIES["wan2.1"] is WAN
    with pytest.raises(ConfigError, match=r"did you mean 'wan2\.1'"):
        FAMILIES["wan21"]


@pytest.mark.parametrize(("task", "steps", "guidance", "shift"), [("t2v", 50, 6.0, 8.0), ("i2v", 40, 5.0, 5.0)])
def test_defaults(task: str, steps: int, guidance: float, shift: float, tmp_path: Path) -> None:
    defaults = WAN.load_defaults(SimpleNamespace(root=tmp_path), task)
    assert (defaults["steps"], defaults["guidance"], defaults["shift"]) == (steps, guidance, shift)
    assert [defaults[key] for key in ("height", "width", "frames", "fps", "solver")] == [480, 832, 81, 16, "unipc"]
    WAN.check_size(defaults["height"], defaults["width"], defaults["frames"])


def test_a_checkpoint_ships_its_own_defaults(tmp_path: Path) -> None:
    (tmp_path / DEFAULTS_FILE).write_text(json.dumps({"t2v": {"height": 64, "steps": 20}}))
    files = SimpleNamespace(root=tmp_path)
    assert WAN.load_defaults(files, "t2v")["height"] == 64
    assert WAN.load_defaults(files, "t2v")["guidance"] == 6.0
    assert WAN.load_defaults(files, "i2v")["height"] == 480


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "not an object of tasks"),
        ('{"t2v": 5}', "not an object of tasks"),
        ('{"t2i": {}}', "unknown task 't2i'"),
        ('{"t2v": {"step": 3}}', "did you mean 'steps'"),
        ('{"t2v": {"steps": "3"}}', "t2v.steps is '3'"),
        ('{"t2v": {"steps": true}}', "t2v.steps is True"),
    ],
)
def test_wrong_shipped_defaults_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / DEFAULTS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        WAN.load_defaults(SimpleNamespace(root=tmp_path), "t2v")


@pytest.mark.parametrize(
    ("size", "key", "nearest"),
    [
        ((481, 832, 81), "video.height", "480, 496"),
        ((480, 830, 81), "video.width", "816, 832"),
        ((480, 832, 80), "video.frames", "77, 81"),
        ((480, 832, 0), "video.frames", "1"),
        ((15, 832, 81), "video.height", "16"),
        ((-16, 832, 81), "video.height", "16"),
    ],
)
def test_a_size_that_does_not_fit_names_the_nearest(size: tuple[int, int, int], key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WAN.check_size(*size)
    assert caught.value.where == key and caught.value.allowed.endswith(f"the nearest: {nearest}")


def test_latent_shape() -> None:
    WAN.check_size(64, 80, 1)
    assert WAN.latent_shape(480, 832, 81) == (16, 21, 60, 104)
    assert WAN.latent_shape(64, 80, 1) == (16, 1, 8, 10)


def test_arch_of_both_layouts() -> None:
    original = WanArch.from_config({**T2V_14B, "_class_name": "WanModel", "model_type": "t2v", "text_len": 512})
    assert (original.head_dim, original.text_dim, original.patch_size) == (128, 4096, (1, 2, 2))
    diffusers = WanArch.from_config(I2V_DIFFUSERS)
    assert diffusers == WanArch.from_config({**T2V_14B, "model_type": "i2v", "in_dim": 36})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "dim missing"),
        ({"num_layers": "40"}, "num_layers is '40'"),
        ({"num_heads": 48}, "dim 5120 over num_heads 48"),
        ({"model_type": "ti2v"}, "model_type 'ti2v'"),
        ({"patch_size": [1, 4, 4]}, "patch_size"),
        ({"num_attention_heads": 40, "pos_embed_seq_len": 514}, "first-and-last-frame"),
    ],
)
def test_a_config_that_is_not_a_wan_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        WanArch.from_config({**T2V_14B, **change})
