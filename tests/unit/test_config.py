from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from pydantic import ValidationError

from lightx2v.config.features import LoraConfig
from lightx2v.config.legacy import RENAMED, UNSUPPORTED, VALUES, WITHOUT_EFFECT
from lightx2v.config.load import load_config
from lightx2v.config.schema import SECTIONS, SETTINGS, Config, MMRule, config_hash, schema_text, settings_page
from lightx2v.errors import ConfigError

ROOT = Path(__file__).parents[2]
WriteJson = Callable[[str | dict[str, Any]], str]


@pytest.fixture
def write(tmp_path: Path) -> WriteJson:
    """Writes a config file and gives its path."""

    def write_json(content: str | dict[str, Any]) -> str:
        path = tmp_path / "run.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return str(path)

    return write_json


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The warnings logged during the test."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


def test_defaults() -> None:
    config = load_config()
    assert config == Config()
    assert (config.model_cls, config.task, config.seed, config.dtype) == ("wan2.1", "t2v", 42, "bfloat16")
    assert config.model_path is None and config.sampling.steps is None


def test_nested_json(write: WriteJson, warnings: list[str]) -> None:
    path = write(
        {
            "$schema": "schema.json",
            "sampling": {"steps": 4, "shift": 5},
            "mm_config": {"mm_type": "int8", "rules": [{"match": "blocks.0.*", "mm_type": "Default"}]},
        }
    )
    config = load_config(path)
    assert (config.sampling.steps, config.sampling.shift) == (4, 5.0)
    assert config.mm_config.rules == (MMRule(match="blocks.0.*", mm_type="Default"),)
    assert warnings == []


def test_frozen() -> None:
    config = load_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.sampling.steps = 1


def test_precedence(write: WriteJson) -> None:
    path = write({"seed": 1, "infer_steps": 1, "sampling": {"shift": 1.0}, "prompt": "json"})
    config = load_config(
        path, {"seed": 2, "sampling.shift": 2.0, "sampling.steps": 2}, ["infer_steps=3", "sampling.steps=3"]
    )
    assert (config.seed, config.sampling.steps, config.sampling.shift, config.prompt) == (2, 3, 2.0, "json")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("prompt=42", "prompt", "42"),
        ("prompt=a=b", "prompt", "a=b"),
        ("prompt=", "prompt", ""),
        ('prompt="quoted"', "prompt", "quoted"),
        ("image_path=null", "image_path", None),
        ("sampling.cfg=false", "sampling.cfg", False),
        ("mm_config.mm_type=int8-vllm", "mm_config.mm_type", "int8-vllm"),
        ('mm_config={"mm_type": "int8"}', "mm_config.mm_type", "int8"),
        ('mm_config.rules=[{"match": "a", "mm_type": "b"}]', "mm_config.rules", (MMRule(match="a", mm_type="b"),)),
        ("use_bfloat16=true", "dtype", "bfloat16"),
    ],
)
def test_set(text: str, key: str, value: object) -> None:
    found: Any = load_config(None, {}, [text])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_set_repeated_takes_the_last_and_needs_an_equals_sign() -> None:
    assert load_config(None, {}, ["seed=1", "seed=2"]).seed == 2
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        load_config(None, {}, ["seed"])


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"infer_stpes": 4}, "'infer_stpes' - did you mean 'sampling.steps'?"),
        ({"promt": "x"}, "did you mean 'prompt'?"),
        ({"steps": 4}, "did you mean 'sampling.steps'?"),
        ({"sampling": {"step": 4}}, "'sampling.step' - did you mean 'sampling.steps'?"),
        ({"mm_config": {"mmtype": "int8"}}, "did you mean 'mm_config.mm_type'?"),
        ({"cpu_ofload": False}, "did you mean 'offload.enabled'?"),
    ],
)
def test_misspelt_key_is_an_error_with_a_suggestion(write: WriteJson, content: dict[str, Any], hint: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: unknown key") and hint in str(caught.value)
    assert caught.value.exit_code == 2 and caught.value.allowed


def test_misspelt_key_in_a_rule() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"mm_config.rules": [{"match": "a", "mm_typ": "b"}]})
    assert "mm_config.rules[0].mm_type is missing" in str(caught.value)
    assert "unknown key 'mm_config.rules[0].mm_typ'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sampling": {"steps": "four"}}, 'sampling.steps is "four"\n  allowed: a valid integer'),
        ({"infer_steps": 1.5}, "infer_steps (sampling.steps) is 1.5\n  allowed: a valid integer"),
        ({"video": {"height": 0}}, "video.height is 0\n  allowed: greater than 0"),
        ({"task": "t2x"}, "task is \"t2x\"\n  allowed: 't2v', 'i2v', 't2i' or 'i2i'"),
        ({"sampling": {"cfg": 1}}, "sampling.cfg is 1\n  allowed: a valid boolean"),
        ({"sampling": {"guidance": True}}, "sampling.guidance is true\n  allowed: a valid number"),
        ({"seed": -1}, "seed is -1\n  allowed: greater than or equal to 0"),
        ({"model_path": ""}, 'model_path is "": String should have at least 1 character'),
        ({"sampling": 4}, "sampling is 4, which is no object\n  allowed: sampling.steps"),
        ({"t5": {"quantized": True}}, "'quantized' is true, so 'quant_scheme' must name a scheme"),
        ('{"sampling": {"shift": NaN}}', "sampling.shift is NaN\n  allowed: a finite number"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(
    write: WriteJson, content: str | dict[str, Any], message: str
) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_every_wrong_value_is_told_with_its_source(write: WriteJson) -> None:
    path = write({"sampling": {"steps": "four"}})
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"seed": "x"}, ["text_len=0"])
    told = str(caught.value)
    assert f"{path}: sampling.steps" in told and "arguments: seed" in told and "--set: text_len" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n  "seed": 1,\n  // note\n}', ":3:3: not JSON: Expecting property name enclosed in double quotes"),
        ('{"seed": 1', ":1:11: not JSON"),
        ("[]", ": the top level is list"),
        ('{"seed": 1, "seed": 2}', ": 'seed' is given twice"),
    ],
)
def test_not_json(write: WriteJson, content: str, message: str) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(path + message)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"prompt": "\xe9"}')
    for path, message in (
        (tmp_path / "absent.json", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "latin.json", "not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(str(path))


def test_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert load_config(str(path)).seed == 3


def test_published_quantization_example_works(write: WriteJson, warnings: list[str]) -> None:
    config = load_config(
        write(
            {
                "infer_steps": 50,
                "target_video_length": 81,
                "target_height": 480,
                "target_width": 832,
                "self_attn_1_type": "flash_attn3",
                "cross_attn_1_type": "flash_attn3",
                "cross_attn_2_type": "flash_attn3",
                "text_len": 512,
                "seed": 42,
                "sample_guide_scale": 6,
                "sample_shift": 8,
                "enable_cfg": True,
                "cpu_offload": False,
                "feature_caching": "NoCaching",
                "lora_configs": None,
                "dit_quantized_ckpt": "ckpt",
                "mm_config": {"mm_type": "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm"},
                "t5_quantized": True,
                "t5_quant_scheme": "fp8",
                "t5_quantized_ckpt": "t5.pth",
                "clip_quantized": True,
                "clip_quant_scheme": "fp8",
                "clip_quantized_ckpt": "clip.pth",
            }
        )
    )
    assert (config.video.frames, config.video.height, config.video.width) == (81, 480, 832)
    assert (config.sampling.steps, config.sampling.guidance, config.sampling.shift) == (50, 6.0, 8.0)
    assert config.sampling.cfg is True and config.attention.type == "flash_attn3"
    assert (config.t5.quantized, config.t5.quant_scheme, config.t5.quantized_ckpt) == (True, "fp8", "t5.pth")
    assert (config.clip.quantized, config.clip.quant_scheme, config.clip.quantized_ckpt) == (True, "fp8", "clip.pth")
    assert len(warnings) == 1
    assert "infer_steps -> sampling.steps" in warnings[0] and "mm_config" not in warnings[0]


LISTS: dict[str, tuple[object, object]] = {
    "lora": ([{"path": "x", "strength": 0.5}], (LoraConfig(path="x", strength=0.5),)),
    "cache.coefficients": ([[1.0, 2.0], [3.0]], ((1.0, 2.0), (3.0,))),
    "cache.ratios": ([1.0, 0.9], (1.0, 0.9)),
    "sampling.denoising_step_list": ([1000, 500], (1000, 500)),
    "sampling.resolution_rate": (0.75, 0.75),
    "offload.granularity": ("phase", "phase"),
    "offload.ratio": (0.5, 0.5),
    "cache.retention": (0.2, 0.2),
}
SWITCHES = {"sampling.changing_resolution", "sampling.cfg", "compile", "lora_dynamic", "mm_config.weight_auto_quant"}


def _example(old: str, new: str) -> tuple[object, object]:
    """A value of an old key, and what the new one makes of it."""
    if old in VALUES:
        return list(VALUES[old].items())[-1] if old != "lora_configs" else LISTS["lora"]
    if new in LISTS:
        return LISTS[new]
    section, _, key = new.partition(".")
    switch = section in ("offload", "vae") and key not in ("workers", "max_memory_gb", "tae_path", "path")
    if key == "quantized":
        return False, False  # true wants a scheme beside it
    if switch or new in SWITCHES or key == "use_ret_steps":
        return True, True
    return ("x", "x") if SETTINGS[new] else (2, 2)


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED.items()))
def test_every_old_name_sets_the_new_one_with_a_warning(old: str, new: str, warnings: list[str]) -> None:
    value, meant = _example(old, new)
    found: Any = load_config(None, {old: value})
    for part in new.split("."):
        found = getattr(found, part)
    assert found == meant
    assert warnings == [f"old names of settings: {old} -> {new}"]


@pytest.mark.parametrize(
    "content",
    [
        {"self_attn_1_type": "flash_attn2", "attn_type": "torch_sdpa"},
        {"teacache_thresh": 0.2, "magcache_thresh": 0.1},
        {"infer_steps": 4, "sampling": {"steps": 5}},
        {"dit_quant_scheme": "int8", "mm_config": {"mm_type": "fp8"}},
        {"dit_quantized": False, "dit_quant_scheme": "int8"},
        {"use_bfloat16": True, "dtype": "float32"},
    ],
)
def test_names_of_one_setting_that_disagree(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="both set") as caught:
        load_config(None, content)
    assert all(json.dumps(v) in str(caught.value) for v in content.values() if not isinstance(v, dict))


def test_dit_quantized() -> None:
    assert load_config(None, {"dit_quantized": True, "dit_quant_scheme": "int8"}).mm_config.mm_type == "int8"
    assert load_config(None, {"mm_config.mm_type": "int8"}, ["dit_quantized=false"]).mm_config.mm_type == "Default"
    with pytest.raises(ConfigError, match="no scheme is named"):
        load_config(None, {"dit_quantized": True})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("t5_lazy_load", True),
        ("parallel", {"seq_p_size": 4}),
        ("use_lightvae", True),
        ("vae_stride", [4, 16, 16]),
    ],
)
def test_feature_that_is_not_there_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .*not supported by this version\n  do: remove '{key}'"):
        load_config(None, {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("t5_lazy_load", False), ("parallel", {}), ("window_size", [-1, -1])],
)
def test_feature_left_off_is_accepted_silently(key: str, value: object, warnings: list[str]) -> None:
    assert load_config(None, {key: value}) == Config()
    assert warnings == []


def test_keys_that_only_tune_a_missing_feature_are_warned_about(warnings: list[str]) -> None:
    key = "clean_" + "cu" + "da_cache"
    assert load_config(None, {"rope_type": "torch", "cfg_scale": 4.0, key: True}) == Config()
    assert warnings == [f"settings without effect in this version: rope_type, cfg_scale, {key}"]


def test_tables_do_not_overlap() -> None:
    tables = [set(SETTINGS) | SECTIONS, set(RENAMED), set(UNSUPPORTED), set(WITHOUT_EFFECT)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(RENAMED.values()) <= set(SETTINGS)


def test_empty_image_path_means_none() -> None:
    assert load_config(None, {"image_path": ""}).image_path is None


def test_hash_names_what_determines_the_result() -> None:
    base = config_hash(Config())
    assert len(base) == 12 and int(base, 16) >= 0
    assert config_hash(load_config(None, {"save_result_path": "a.mp4", "seed": 42, "$schema": "x"})) == base
    assert config_hash(load_config(None, {"sampling.steps": 4})) != base
    assert config_hash(load_config(None, {"infer_steps": 4})) == config_hash(load_config(None, {"sampling.steps": 4}))


def test_every_setting_is_described() -> None:
    schema = json.loads(schema_text())
    groups = [schema, *schema["$defs"].values()]
    for group in groups:
        assert group["additionalProperties"] is False and group["description"]
        assert all(field.get("description") for field in group["properties"].values())


def test_committed_schema_is_up_to_date() -> None:
    committed = (ROOT / "configs" / "schema.json").read_text("utf-8")
    assert committed == schema_text(), "run: lightx2v schema > configs/schema.json"


def test_import_needs_no_torch() -> None:
    code = "import sys, lightx2v.config.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_committed_page_of_settings_is_up_to_date() -> None:
    page = (ROOT / "docs" / "config.md").read_text("utf-8")
    assert page == settings_page(), "run: lightx2v schema --markdown > docs/config.md"
    assert all(f"| `{key}` |" in page for key in SETTINGS)
