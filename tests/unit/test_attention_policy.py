from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lightx2v.attention.base import ANYTHING, ATTENTION, Needs, Part
from lightx2v.attention.policy import AttentionPolicy, PolicySwitch, Slot, indices, resolve_policy
from lightx2v.config.features import AttentionConfig
from lightx2v.errors import ConfigError
from lightx2v.platform import DeviceInfo
from tests.contracts import attention

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1 << 34, 1 << 33)
ADA = DeviceInfo("cuda", 0, "an RTX 4090", (8, 9), 1 << 34, 1 << 34)
BLOCKS, STEPS = 4, 6
VIDEO: list[Slot] = [(layer, part) for layer in range(BLOCKS) for part in ("self", "cross", "image")]  # type: ignore[misc]
JOINT: list[Slot] = [(layer, "self") for layer in range(BLOCKS)]


def policy(
    slots: list[Slot] = JOINT, device: DeviceInfo = CPU, needs: Needs = ANYTHING, **config: Any
) -> AttentionPolicy:
    return resolve_policy(AttentionConfig.model_validate(config), device, slots, STEPS, needs=needs)


def rule(type: str, **scope: Any) -> dict[str, Any]:
    return {"type": type, **scope}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("0:2", [0, 1]),
        ("4:", [4, 5]),
        (":2", [0, 1]),
        ("-2:", [4, 5]),
        ("-1", [5]),
        ("3", [3]),
        ("0,3:5", [0, 3, 4]),
        ("4:99,0", [0, 4, 5]),
        ("::2", [0, 2, 4]),
        ("3:3", []),
        (" 1 : 3 ", [1, 2]),
    ],
)
def test_ranges(text: str | None, wanted: list[int]) -> None:
    assert list(indices(text, 6, "here", "steps")) == wanted


@pytest.mark.parametrize("text", ["x", "", ",", "1,", "1:2:3:4", "1.5", "0:6:0", "1-3"])
def test_a_malformed_range_says_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here: .* is malformed") as caught:
        indices(text, 6, "here", "steps")
    assert "'0,3:7'" in caught.value.allowed


@pytest.mark.parametrize("text", ["6", "6:", "7:9", "-7", "-7:2", "0,6"])
def test_a_range_that_begins_beyond_the_last_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="begins beyond the last of 6 steps") as caught:
        indices(text, 6, "here", "steps")
    assert caught.value.allowed == "0 to 5"


def test_without_rules_every_part_has_the_type() -> None:
    found = policy(VIDEO, type="fp8_ref")
    assert len(found.tables) == 1 and set(found.at(0).values()) == {"fp8_ref"} and set(found.at(3)) == set(VIDEO)
    assert found.describe() == {
        "where": [
            {"part": part, "steps": "0:6", "layers": "0:4", "backend": "fp8_ref"} for part in ("self", "cross", "image")
        ],
        "why": {"fp8_ref": "named"},
        "unused_rules": [],
    }
    assert not found.exact and policy(type="torch_sdpa").exact


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"cross": "torch_sdpa_math"}, ("fp8_ref", "torch_sdpa_math", "torch_sdpa_math")),
        ({"cross_image": "torch_sdpa_math"}, ("fp8_ref", "fp8_ref", "torch_sdpa_math")),
        ({"cross": "sdpa", "cross_image": "cpu_flash"}, ("fp8_ref", "torch_sdpa", "cpu_flash")),
    ],
)
def test_the_attentions_to_text_and_image_have_their_own_types(config: dict[str, str], wanted: tuple[str, ...]) -> None:
    table = policy(VIDEO, type="fp8_ref", **config).at(0)
    assert tuple(table[2, part] for part in ("self", "cross", "image")) == wanted


def test_the_last_rule_that_matches_wins() -> None:
    found = policy(
        VIDEO,
        type="sage_ref_int8_fp8",
        rules=[
            rule("torch_sdpa", steps=":2", part="self"),
            rule("cpu_flash", layers="0,-1", part="self"),
            rule("fp8_ref", steps="1", layers="3"),
        ],
    )
    selfs = [[found.at(step)[layer, "self"] for layer in range(BLOCKS)] for step in range(STEPS)]
    dense, eight = "torch_sdpa", "sage_ref_int8_fp8"
    assert selfs[0] == ["cpu_flash", dense, dense, "cpu_flash"]
    assert selfs[1] == ["cpu_flash", dense, dense, "fp8_ref"]
    assert selfs[2] == selfs[5] == ["cpu_flash", eight, eight, "cpu_flash"]
    assert found.at(1)[3, "cross"] == found.at(1)[3, "image"] == "fp8_ref"
    assert found.at(2)[3, "cross"] == eight
    assert len(found.tables) == 3 and found.at(2) is found.at(5)
    assert set(found.reasons) == set(found.functions) == {dense, eight, "cpu_flash", "fp8_ref"}
    rows = found.describe()["where"]
    assert {"part": "self", "steps": "2:6", "layers": "1:3", "backend": eight} in rows
    assert {"part": "cross", "steps": "2:6", "layers": "0:4", "backend": eight} in rows
    covered = [row for row in rows if row["part"] == "self" and row["steps"] == "1:2"]
    assert [row["layers"] for row in covered] == ["0:1", "1:3", "3:4"]


def test_rules_that_cover_nothing_are_listed() -> None:
    found = policy(rules=[rule("fp8_ref", part="image"), rule("torch_sdpa", steps="3:3"), rule("fp8_ref", layers="1")])
    assert found.unused == (
        "attention.rules[0]: fp8_ref for part image covers nothing",
        "attention.rules[1]: torch_sdpa for steps 3:3 covers nothing",
    )
    assert found.describe()["unused_rules"] == list(found.unused)


@pytest.mark.parametrize(
    ("config", "where", "what"),
    [
        ({"type": "fp8_reff"}, "attention.type", "did you mean 'fp8_ref'"),
        ({"cross": "sage_atn2"}, "attention.cross", "did you mean 'sage_attn2'"),
        ({"cross": "sparge_attn"}, "attention.cross", "made for the attention of video tokens to themselves"),
        ({"rules": [rule("flash_attn3")]}, "attention.rules[0].type", "needs an NVIDIA GPU of compute capability 9.0"),
        ({"rules": [rule("fp8_ref"), rule("fp8_ref", steps="9:")]}, "attention.rules[1].steps", "beyond the last of 6"),
        ({"rules": [rule("fp8_ref", layers="4")]}, "attention.rules[0].layers", "beyond the last of 4 blocks"),
        ({"rules": [rule("fp8_ref", layers="a")]}, "attention.rules[0].layers", "is malformed"),
        ({"rules": [rule("sparge_attn", part="cross")]}, "attention.rules[0].type", "made for the attention of video"),
    ],
)
def test_errors_name_the_key(config: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(VIDEO, ADA, **config)
    assert caught.value.where == where and what in caught.value.what


def test_what_the_run_needs_reaches_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    with pytest.raises(ConfigError, match="takes no mask that differs"):
        policy(VIDEO, ADA, Needs(masks=True), type="flash_attn2")
    with pytest.raises(ConfigError, match="takes heads of width"):
        policy(VIDEO, ADA, Needs(head_dim=160), type="sage_attn2")
    with pytest.raises(ConfigError, match="at least 128 tokens"):
        policy(VIDEO, ADA, Needs(tokens=80), type="sparge_attn")
    with pytest.raises(ConfigError, match=r"attention\.allow_download is false"):
        policy(VIDEO, ADA, type="sage_attn2_hub")
    found = policy(VIDEO, ADA, type="sage_attn2_hub", allow_download=True)
    found.load()
    assert [call.given["repo_id"] for call in attention.vendors.CALLS] == ["kernels-community/sage-attention"]
    assert set(policy(VIDEO, ADA, type="flash_attn3", fallback=True).at(0).values()) == {"flash_attn2"}


def test_backends_for_video_tokens_leave_the_text_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.install(monkeypatch)
    table = policy(VIDEO, ADA, type="sparge_attn").at(0)
    assert [table[0, part] for part in ("self", "cross", "image")] == ["sparge_attn", "flash_attn2", "flash_attn2"]
    table = policy(VIDEO, ADA, rules=[rule("sparge_attn", layers="1:")]).at(0)
    assert [table[1, part] for part in ("self", "cross")] == ["sparge_attn", "flash_attn2"]
    assert table[0, "self"] == "flash_attn2"


@dataclass
class Module:
    attention: Any = None
    written: int = 0

    def __setattr__(self, name: str, value: object) -> None:
        if name != "written":
            object.__setattr__(self, "written", getattr(self, "written", 0) + 1)
        object.__setattr__(self, name, value)


@dataclass
class ModelPart:
    layer: int
    part: Part
    module: Module = field(default_factory=Module)
    name: str = "attention"


def test_functions_are_set_where_they_change_and_only_there() -> None:
    parts = [ModelPart(layer, part) for layer, part in VIDEO]
    found = policy(VIDEO, type="fp8_ref", rules=[rule("torch_sdpa", steps=":2", layers="1", part="self")])
    switch = PolicySwitch(parts, found)

    def names() -> dict[Slot, str]:
        functions = {ATTENTION[name].fn: name for name in found.functions}
        return {(part.layer, part.part): functions[part.module.attention] for part in parts}

    for step in range(STEPS):
        for part in parts:
            part.module.written = 0
        switch.at(step)
        assert names() == found.at(step)
        assert sum(part.module.written for part in parts) == {0: len(parts), 2: 1}.get(step, 0)
    switch.at(0)  # the next request
    assert names() == found.at(0)


def test_the_size_of_the_video_reaches_the_backend_that_must_know_it() -> None:
    parts = [ModelPart(layer, "self") for layer in range(BLOCKS)]
    found = policy(type="radial_attn", rules=[rule("torch_sdpa", layers="0")])
    switch = PolicySwitch(parts, found)
    switch.at(0, (4, 2, 3))
    radial = ATTENTION["radial_attn"].for_grid
    assert radial is not None and parts[1].module.attention is radial((4, 2, 3))
    assert parts[0].module.attention is ATTENTION["torch_sdpa"].fn
    switch.at(1, (4, 4, 6))
    assert parts[1].module.attention is radial((4, 4, 6)) is not radial((4, 2, 3))
