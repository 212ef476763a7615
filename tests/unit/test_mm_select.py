"""Which library computes a layer, and what is said when none can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loguru import logger

from lightx2v.config.schema import MMRule
from lightx2v.errors import ConfigError
from lightx2v.mm import libraries, select
from lightx2v.mm.libraries import unavailable
from lightx2v.mm.scheme import known_names, parse
from lightx2v.mm.select import LayerPlan, match_rules, plan_layer
from lightx2v.platform import DeviceInfo, Probe

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
MPS = DeviceInfo("mps", 0, "a laptop", None, 1, 1)


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "probe", lambda module: Probe(module, None, "not installed"))
    select._warn_once.cache_clear()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    handle = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(handle)


def plan(mm_type: str, device: DeviceInfo = CPU, fallback: bool = False) -> LayerPlan:
    return plan_layer("blocks.0.ffn.0", mm_type, parse(mm_type), 256, 128, device=device, fallback=fallback)


@pytest.mark.parametrize("name", known_names())
def test_every_name_is_served_or_has_its_reason(name: str) -> None:
    """A name gives a plan, or an error that says why not: never a KeyError, never an empty reason."""
    scheme = parse(name)
    try:
        layer = plan(name)
    except ConfigError as error:
        assert scheme.library not in ("auto", "reference", "torch")
        assert f"{scheme.library}: " in str(error)
        assert len(unavailable(scheme.library, scheme, 256, 128, CPU) or "") > 10
    else:
        allowed = ("torch", "onednn", "torch_native", "outliers", "dequantize", "reference", "angelslim")
        assert layer.library in allowed
        assert layer.scheme.numerics == scheme.numerics and layer.reason


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-b128"])
def test_auto_takes_the_fastest_that_works_on_the_device(name: str) -> None:
    assert plan(name).library == "onednn"
    elsewhere = plan(name, MPS)
    assert elsewhere.library == "reference"
    assert "onednn: computes on CPUs" in elsewhere.reason and "torch_native: " in elsewhere.reason


def test_a_named_library_is_used_or_refused() -> None:
    assert plan("int8-reference").library == "reference"
    with pytest.raises(ConfigError) as error:
        plan("fp8-vllm")
    text = str(error.value)
    assert "vllm: vllm is not installed (pip install vllm)" in text
    assert "blocks.0.ffn.0" in text and "fallback" in text
    for library in ("TorchNative-ActVllm (library torch)", "Reference-ActVllm (library reference)"):
        assert library in text
    with pytest.raises(ConfigError, match="onednn: computes on CPUs"):
        plan("fp8-onednn", MPS)


def test_an_installed_library_without_adapter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "probe", lambda module: Probe(module, "1.2.3", None))
    with pytest.raises(
        ConfigError,
        match=r"needs a Moore Threads GPU; torch_musa 1\.2\.3 is installed; this version has no adapter for it yet",
    ):
        plan("fp8-musa")
    with pytest.raises(ConfigError, match="needs an Ascend NPU"):
        plan("int8-npu")


def test_fallback_warns_once_and_is_in_the_reason(warnings: list[str]) -> None:
    first, second = (plan("fp8-sgl", fallback=True) for _ in range(2))
    assert first == second and first.library == "onednn"
    assert first.reason.startswith("fallback from sgl (sgl_kernel is not installed (pip install sglang-kernel)")
    assert first.scheme.act_library == "sgl" and first.mm_type == "fp8-sgl"
    assert len(warnings) == 1 and "instead of sgl" in warnings[0]


@pytest.mark.parametrize(
    "name", ["W-mxfp4-group32-A-mxfp8-group32-Auto", "Calib", "W-int8-channel-A-int8-channel-dynamic-Auto"]
)
def test_what_no_library_computes_is_refused_even_with_fallback(name: str) -> None:
    with pytest.raises(ConfigError, match="reference: does not compute this scheme"):
        plan(name, fallback=True)


def test_the_last_rule_that_matches_counts() -> None:
    rules = [
        MMRule(match="blocks.*", mm_type="int8"),
        MMRule(match="*.ffn.*", mm_type="fp8"),
        MMRule(match=r"re:blocks\.0\..*", mm_type="Default"),
        MMRule(match="blocks.0.ffn", mm_type="fp8-b128"),
    ]
    names = ["blocks.0.ffn.0", "blocks.1.ffn.0", "blocks.1.attn.q", "head"]
    types, unused = match_rules(names, "int8-torch", rules)
    assert list(types.values()) == ["Default", "fp8", "int8", "int8-torch"]
    assert unused == [rules[3]]


def test_a_rule_matches_whole_names_and_dots_literally() -> None:
    rules = [MMRule(match="blocks.1", mm_type="int8"), MMRule(match=r"re:block", mm_type="int8")]
    types, unused = match_rules(["blocks.10", "blocksX1"], "Default", rules)
    assert set(types.values()) == {"Default"} and unused == rules


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        match_rules(["a"], "Default", [MMRule(match="re:(", mm_type="int8")])
