"""The names of mm_type."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightx2v.errors import ConfigError
from lightx2v.mm.scheme import known_names, parse
from lightx2v.quant.spec import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_GROUP128,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
    QSpec,
)

INT8, FP8, BLOCK = (INT8_CHANNEL, INT8_TOKEN), (FP8_CHANNEL, FP8_TOKEN), (FP8_BLOCK128, FP8_GROUP128)
FP8_LONG, INT8_LONG = (f"W-{d}-channel-sym-A-{d}-channel-sym-dynamic-" for d in ("fp8", "int8"))
BLOCK_LONG = "W-fp8-block128-sym-A-fp8-channel-group128-sym-dynamic-"

#: name: (weight, activation), library, activation library. The first ten are LightX2V's own long names.
MEANINGS = {
    FP8_LONG + "Vllm": (FP8, "vllm", "vllm"),
    INT8_LONG + "Vllm": (INT8, "vllm", "vllm"),
    FP8_LONG + "Q8F": (FP8, "q8f", "vllm"),
    INT8_LONG + "Q8F": (INT8, "q8f", "vllm"),
    BLOCK_LONG + "Deepgemm": (BLOCK, "deepgemm", "deepgemm"),
    BLOCK_LONG + "Deepgemm-ActSgl": (BLOCK, "deepgemm", "sgl"),
    FP8_LONG + "Vllm-ActSgl": (FP8, "vllm", "sgl"),
    FP8_LONG + "Sgl-ActVllm": (FP8, "sgl", "vllm"),
    FP8_LONG + "Sgl": (FP8, "sgl", "sgl"),
    INT8_LONG + "Sgl-ActVllm": (INT8, "sgl", "vllm"),
    "int8": (INT8, "auto", "auto"),
    "fp8": (FP8, "auto", "auto"),
    "fp8-b128": (BLOCK, "auto", "auto"),
    "int8-torch": (INT8, "torch_native", "torch_native"),
    INT8_LONG + "TorchNative": (INT8, "torch_native", "torch_native"),
    "fp8-b128-reference": (BLOCK, "reference", "reference"),
    BLOCK_LONG + "Reference": (BLOCK, "reference", "reference"),
    "fp8-b128-deepgemm": (BLOCK, "deepgemm", "deepgemm"),
    "int8-q8f": (INT8, "q8f", "vllm"),
    "int8-torchao": (INT8, "torchao", "torchao"),
    "fp8-triton": (FP8, "triton", "triton"),
    "int8-vllm-hygon-dcu": (INT8, "hygon_dcu", "hygon_dcu"),
    "fp8-intel-xpu": (FP8, "intel_xpu", "intel_xpu"),
    "Default": ((None, None), "torch", "torch"),
    "Default-Force-FP32": ((None, None), "torch", "torch"),
    "int4-g128-marlin": ((QSpec("int4", "group", 128), None), "marlin", "marlin"),
    "nvfp4": (
        (QSpec("nvfp4", "group", 16), QSpec("nvfp4", "group", 16, dynamic=True)), "auto", "auto",
    ),
}  # fmt: skip
HEAD = (
    "fp8-vllm int8-vllm fp8-sgl int8-sgl fp8-q8f int8-q8f fp8-triton int8-triton fp8-b128-deepgemm fp8-torchao "
    "int8-torchao nvfp4 nvfp4-split-n-workaround mxfp4 mxfp6-mxfp8 mxfp8 fp8-pertensor int4-g128-marlin gguf-BF16 "
    "gguf-Q8_0 gguf-Q6_K gguf-Q5_K_S gguf-Q5_K_M gguf-Q5_1 gguf-Q5_0 gguf-Q4_K_M gguf-Q4_K_S gguf-Q4_1 gguf-Q4_0 "
    "gguf-Q3_K_M gguf-Q3_K_S Calib CalibMax TensorParallel int8-npu int8-tmo fp8-musa int8-iluvatar "
    "int8-vllm-hygon-dcu fp8-intel-xpu"
).split()


@pytest.mark.parametrize("name", MEANINGS)
def test_meaning(name: str) -> None:
    scheme = parse(name)
    assert (scheme.numerics, scheme.library, scheme.act_library) == MEANINGS[name]


def test_every_released_name_is_known() -> None:
    assert {*MEANINGS, *HEAD} <= set(known_names())


@pytest.mark.parametrize("name", known_names())
def test_the_canonical_name_means_the_same(name: str) -> None:
    scheme = parse(name)
    assert parse(scheme.name) == scheme
    assert scheme.name == name or not name.startswith("W-")


def test_symmetry_and_case_of_the_grammar() -> None:
    assert parse("W-fp8-channel-A-fp8-token-dynamic-vllm") == parse("fp8-vllm")
    asymmetric = parse("W-int8-channel-A-int8-channel-sym-dynamic-Vllm")
    assert asymmetric.weight == QSpec("int8", "channel", symmetric=False)
    static = parse("W-int8-channel-sym-A-int8-channel-sym-Vllm")
    assert static.activation == QSpec("int8", "token")


def test_another_library_keeps_the_named_rounding() -> None:
    moved = parse("fp8-vllm").with_library("torch_native")
    assert moved.name == FP8_LONG + "TorchNative-ActVllm"
    assert (moved.library, moved.act_library, moved.numerics) == ("torch_native", "vllm", FP8)
    assert parse("fp8").with_library("reference") == parse("fp8-reference")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vlm", FP8_LONG + "Vllm"),
        ("int8-vlm", "int8-vllm"),
        ("default", "Default"),
        ("fp8-b182", "fp8-b128"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        parse(name)


@pytest.mark.parametrize(
    "name", ["", "W-", "int8-", "W-fp9-channel-sym-Vllm", "W-fp8-channel-sym-A-fp8-channel-sym-Vllm-ActNo"]
)
def test_nonsense_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown mm_type"):
        parse(name)


def test_the_grammar_needs_no_torch() -> None:
    code = "import sys, lightx2v.mm.scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_activations_are_quantized_by_a_library_whose_rounding_is_known() -> None:
    assert parse(INT8_LONG + "Reference-ActVllm").act_library == "vllm"
    for library in ("Npu", "Auto", "Marlin"):
        with pytest.raises(ConfigError, match="unknown mm_type"):
            parse(f"{INT8_LONG}Reference-Act{library}")
