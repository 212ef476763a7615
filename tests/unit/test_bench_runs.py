"""`lightx2v bench` on real layers and models of the smallest sizes, against diffusers and a peer made here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightx2v.bench import cli, dit, roofline, trace, work
from lightx2v.bench.peers import base
from lightx2v.bench.peers.base import Peer
from lightx2v.cli import main
from lightx2v.errors import ResourceError
from lightx2v.platform import select_device
from lightx2v.registry import Registry


class RoundedLinear(nn.Module):
    """What a library that only rounds weights would put in a model: int8 codes and one scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", layer.weight.detach().abs().max() / 127)
        self.register_buffer("codes", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def round_weights(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, RoundedLinear(layer))


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry: Registry[Peer] = Registry("--peers")
    registry.add("diffusers", base.PEERS["diffusers"])
    registry.add("rounded", Peer("rounded", "int8 weights", ("torch",), round_weights))
    registry.add("absent", Peer("absent", "nothing", ("a_module_that_is_not_there",), round_weights))
    monkeypatch.setattr(base, "PEERS", registry)
    yield


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main([*argv, "--device", "cpu", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def check_consistent(report: dict[str, Any], names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """What every report must hold; the entries of its first case by name."""
    assert report["hardware"]["threads"] and report["hardware"]["cpu"] and report["versions"]["torch"]
    assert report["command"].startswith(f"lightx2v bench {report['bench']} ") and "--json" not in report["command"]
    for case in report["cases"]:
        entries = {entry["name"]: entry for entry in case["entries"]}
        assert list(entries) == names and case["order"] == names * repeats and case["baseline"] == names[0]
        for entry in entries.values():
            assert len(entry["seconds"]) == repeats and all(seconds > 0 for seconds in entry["seconds"])
            assert entry["median_s"] == statistics.median(entry["seconds"])
            assert entry["min_s"] == min(entry["seconds"])
            assert entry["ratio_to_baseline"] == entry["median_s"] / entries[names[0]]["median_s"]
        for peer, ratios in case["peer_over_lightx2v"].items():
            for ours, ratio in ratios.items():
                assert ratio == entries[peer]["median_s"] / entries[ours]["median_s"]
    return {entry["name"]: entry for entry in report["cases"][0]["entries"]}


def test_roofline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SIDES", {"cpu": 64})
    monkeypatch.setattr(roofline, "_BYTES", {"cpu": 1 << 16})

    def lacking(*_: object, **__: object) -> Tensor:
        raise NotImplementedError("no such product")

    monkeypatch.setattr(torch, "_int_mm", lacking)
    found = run(capsys, "roofline", "--repeats", "2", "--warmup", "1")
    (case,) = found["cases"]
    by_name = {entry["name"]: entry for entry in case["entries"]}
    assert {"copy", "bf16"} <= set(by_name) and "int8" not in by_name
    assert {one["name"]: one["reason"] for one in case["skipped"]}["int8"].endswith("no such product")
    assert by_name["copy"]["bytes_per_s"] == pytest.approx(2 * (1 << 16) / min(by_name["copy"]["seconds"]))
    assert by_name["bf16"]["flops_per_s"] == pytest.approx(2 * 64**3 / min(by_name["bf16"]["seconds"]))
    assert found["settings"]["peaks"]["bf16"] == by_name["bf16"]["flops_per_s"]


def test_linear(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "linear --shapes 192x128,128x256 --rows 8,24 --repeats 2 --mm_type Default,int8,fp8-vllm"
    report = run(capsys, *argv.split(), "--peers", "rounded,absent,diffusers")
    entries = check_consistent(report, ["torch bfloat16", "Default", "int8", "rounded"], 2)
    works = [case["work"] for case in report["cases"]]
    assert [(one["n"], one["k"], one["rows"]) for one in works] == [
        (192, 128, 8), (192, 128, 24), (128, 256, 8), (128, 256, 24)
    ]  # fmt: skip
    assert works[0]["flops"] == 2 * 192 * 128 * 8
    int8 = entries["int8"]
    assert int8["flops_per_s"] == works[0]["flops"] / int8["median_s"]
    assert int8["share_of_peak"] == int8["flops_per_s"] / report["settings"]["peak_flops_per_s"]
    moved = int8["weight_bytes"] + 2 * 8 * (192 + 128)
    assert int8["bytes_per_s"] == pytest.approx(moved / int8["median_s"])
    assert (
        entries["Default"]["error"] == 0 and 0.001 < int8["error"] < 0.02 and 0.001 < entries["rounded"]["error"] < 0.05
    )
    assert entries["Default"]["weight_bytes"] == 2 * (192 * 128 + 192) > int8["weight_bytes"] > 192 * 128
    skipped = {one["name"]: one["reason"] for one in report["cases"][0]["skipped"]}
    assert list(skipped) == ["fp8-vllm", "absent", "diffusers"]
    assert "vllm" in skipped["fp8-vllm"] and "is not installed" in skipped["absent"]


def test_linear_by_library(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(
        capsys, *"linear --shapes 128x128 --rows 8 --repeats 1 --mm_type int8 --library torch,reference".split()
    )
    entries = check_consistent(report, ["torch bfloat16", "int8-torch", "int8-reference"], 1)
    assert entries["int8-torch"]["library"] == "torch_native" and entries["int8-reference"]["library"] == "reference"
    assert entries["int8-torch"]["error"] == pytest.approx(entries["int8-reference"]["error"], rel=0.1)


def test_dit(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "dit --model tiny --size 32x48 --layers 2 --repeats 2 --mm_type Default,int8"
    report = run(capsys, *argv.split(), "--peers", "diffusers,rounded,absent")
    entries = check_consistent(report, ["Default", "int8", "diffusers", "rounded"], 2)
    case = report["cases"][0]
    assert case["work"]["tokens"] == 2 * 2 * 3 and case["work"]["layers"] == 2
    assert entries["diffusers"]["flops_per_s"] == case["work"]["flops"] / entries["diffusers"]["median_s"]
    # The same weights and inputs in both: what is left is rounding, less of it where nothing is quantized.
    assert 0 < entries["diffusers"]["error"] < 0.01
    assert entries["diffusers"]["error"] < entries["rounded"]["error"] < 0.1 and 0 < entries["int8"]["error"] < 0.05
    blocks = 2 * (8 * 256 * 256 + 2 * 256 * 512)
    saved = entries["Default"]["weight_bytes"] - entries["int8"]["weight_bytes"]
    assert 0.9 * blocks < saved < blocks
    assert entries["diffusers"]["weight_bytes"] - entries["rounded"]["weight_bytes"] > 0.9 * blocks
    assert [one["name"] for one in case["skipped"]] == ["absent"]


def test_where_the_time_of_a_forward_pass_goes(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("dit", "--model", "tiny", "--size", "64x64", "--frames", "1", "--layers", "1", "--trace")
    found = run(capsys, *argv, "--mm_type", "Default", "--repeats", "1", "--warmup", "1")
    (entry,) = found["cases"][0]["entries"]
    assert entry["trace"]["linears"] > 0 and entry["trace"]["elementwise"] > 0 and entry["trace"]["gaps"] == 0
    assert any("one call profiled" in note for note in found["notes"])


def test_kernels_are_told_apart_and_gaps_are_what_no_kernel_fills() -> None:
    pieces = [
        ("_gemm_kernel", 0, 4),
        ("_attend_kernel", 6, 3),
        ("_tokens", 8, 4),
        ("rms_norm", 13, 1),
        ("copy_", 13, 2),
    ]
    found = trace.shares(trace.Piece(name, start * 1e6, length * 1e6) for name, start, length in pieces)
    assert found == {"linears": 4, "attention": 3, "quantization": 4, "elementwise": 1, "copies": 2, "gaps": 3}


def test_what_of_the_transfers_other_work_hides() -> None:
    pieces = [
        ("Memcpy HtoD (Pinned -> Device)", 0, 4),
        ("_gemm_kernel", 1, 2),
        ("_attend_kernel", 2, 1.5),
        ("Memcpy HtoD (Pinned -> Device)", 5, 2),
        ("Memcpy DtoD (Device -> Device)", 6.5, 3),
        ("Memcpy HtoD (Pinned -> Device)", 8, 1),
        ("_tokens", 20, 1),
    ]
    found = trace.transfers([trace.Piece(name, start * 1e6, length * 1e6) for name, start, length in pieces])
    assert found == trace.Transfers(7, 2.5 + 0.5 + 1)
    assert trace.transfers([]) == trace.Transfers(0, 0)


@pytest.mark.parametrize("unit", ["block", "phase"])
def test_an_offloaded_dit_gives_the_same_result(capsys: pytest.CaptureFixture[str], unit: str) -> None:
    argv = ("dit", "--model", "tiny", "--size", "32x48", "--frames", "5", "--repeats", "1", "--warmup", "1")
    report = run(capsys, *argv, "--mm_type", "int8", "--offload", unit, "--seed", "3", "--trace")
    names = ["int8", f"int8 offload {unit}"]
    entries = {entry["name"]: entry for entry in report["cases"][0]["entries"]}
    assert list(entries) == names and all(entry["error"] == 0 for entry in entries.values())


def test_dit_of_image_to_video_does_what_diffusers_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(work.arch_of("tiny"), in_dim=36, model_type="i2v", image_dim=64, num_layers=1, text_len=512)
    monkeypatch.setattr(work, "arch_of", lambda model: small)
    report = run(capsys, *"dit --size 32x32 --repeats 1 --warmup 1 --mm_type Default --peers diffusers".split())
    assert 0 < check_consistent(report, ["Default", "diffusers"], 1)["diffusers"]["error"] < 0.01


def test_models_that_do_not_fit_together_are_refused() -> None:
    device = replace(select_device("cpu"), free_memory=2**30)
    shapes, linears = work.dit_shapes(work.arch_of("wan-1.3b"))
    plans, refused = dit.plan_types(linears, ["Default", "int8", "fp8-vllm"], device)
    assert list(plans) == ["Default", "int8"] and list(refused) == ["fp8-vllm"]
    choices = base.choose("diffusers,rounded", "dit")
    needs = dit.weight_needs(shapes, plans, choices, device)
    assert needs["Default"] == needs["diffusers"] == needs["rounded"] == pytest.approx(2.84e9, rel=0.01)
    assert needs["int8"] < 0.6 * needs["Default"]
    with pytest.raises(ResourceError, match=r"about 9\.\d+ GiB \(Default 2\.64 GiB, .*1 GiB are free"):
        dit.check_memory(needs, work.arch_of("wan-1.3b"), 3120, device)
    roomy = replace(device, free_memory=2**36)
    assert dit.check_memory(needs, work.arch_of("wan-1.3b"), 3120, roomy) > sum(needs.values())


def test_e2e(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"--set=video.{name}" for name in ("height=32", "width=48", "frames=5")]
    report = run(
        capsys,
        "e2e",
        *sizes,
        "--set=sampling.steps=2",
        "--repeats=2",
        "--mm_type=Default,int8",
        "--peers=diffusers,absent",
    )
    entries = check_consistent(report, ["Default", "int8", "diffusers"], 2)
    assert report["cases"][0]["work"]["steps"] == 2
    for entry in entries.values():
        assert list(entry["stages"]) == ["encode text", "denoise", "decode"]
        for index, total in enumerate(entry["seconds"]):
            assert 0.5 * total < sum(seconds[index] for seconds in entry["stages"].values()) <= total
    assert 0 <= entries["diffusers"]["error"] < 0.02 and entries["int8"]["error"] < 0.05
    assert entries["int8"]["weight_bytes"] < entries["Default"]["weight_bytes"]


def test_text_and_markdown_from_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "cpu.md"
    argv = (
        "bench linear --shapes 128x128 --rows 8 --repeats 1 --warmup 1 --mm_type int8 --device cpu --title Mine".split()
    )
    assert main([*argv, "--markdown", str(path)]) == 0
    printed, written = capsys.readouterr().out, path.read_text()
    assert "128x128, 8 rows" in printed and "### Mine" in written and str(path) not in written
    assert written.count("| torch bfloat16 |") == 1 and "lightx2v bench linear --shapes 128x128" in written


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("dit --model wan-1.3", "did you mean 'wan-1.3b'?"),
        ("dit --model tiny --layers 9", "1 to 4 for tiny"),
        ("dit --model tiny --size 33x32", "video.width: 33 does not fit"),
        ("linear --peers round", "did you mean 'rounded'?"),
        ("linear --mm_type int9", "did you mean 'int8'?"),
        ("e2e --mm_type int9", "did you mean 'int8'?"),
    ],
)
def test_mistakes_exit_with_2(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert main(["bench", *argv.split(), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
