"""How much memory each form of offload takes, which one `auto` chooses, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightx2v.config.features import OffloadConfig
from lightx2v.errors import ConfigError, UserError
from lightx2v.features.offload.choose import Placement, Sizes, check_settings, decide, measure, place
from lightx2v.features.offload.load import spread
from lightx2v.platform import DeviceInfo

GB = 10**9
GPU = DeviceInfo("xpu", 0, "fake", None, 24 * GB, 24 * GB)
CPU = DeviceInfo("cpu", 0, "fake", None, 24 * GB, 24 * GB)
SIZES = Sizes((1 * GB,) * 10, part=GB // 2, small=0, rest=GB)
OFF, AUTO = OffloadConfig(), OffloadConfig(enabled="auto")
WORK, OTHERS = 2 * GB, 3 * GB


def on(**settings: Any) -> OffloadConfig:
    return OffloadConfig(enabled=True, **settings)


def peak(placed: Placement) -> int:
    """Of a plan with other models that stay, whose own stage takes as much as the loop."""
    return OTHERS + WORK + max(placed.device, placed.idle)


def decided(available: float, host: float = 1000, device: DeviceInfo = GPU, **options: Any) -> Placement:
    settings = options.pop("settings", AUTO)
    available, host = int(available * GB), int(host * GB)
    return decide(settings, SIZES, device, peak=peak, available=available, host_free=host, **options)


@pytest.mark.parametrize(
    ("settings", "device", "idle", "host"),
    [
        (OFF, 11, 11, 0),
        (on(granularity="model"), 11, 0, 11),
        (on(), 3, 1, 10),
        (on(ratio=0.5), 8, 6, 5),
        (on(ratio=0.0), 11, 11, 0),
        (on(granularity="phase"), 2, 1, 10),
        (on(lazy_load=True), 3, 1, 2),
        (on(lazy_load=True, max_memory_gb=4e9 / 2**30), 3, 1, 6),
        (on(lazy_load=True, max_memory_gb=100.0), 3, 1, 10),
    ],
)
def test_bytes_of_each_form(settings: OffloadConfig, device: float, idle: float, host: float) -> None:
    placed = place(settings, SIZES, GPU)
    assert (placed.device / GB, placed.idle / GB, placed.host / GB) == pytest.approx((device, idle, host))


@pytest.mark.parametrize(("settings", "device", "saves"), [(on(), 13, False), (on(lazy_load=True), 3, True)])
def test_the_memory_of_a_cpu_is_the_host_s(settings: OffloadConfig, device: int, saves: bool) -> None:
    placed = place(settings, SIZES, CPU)
    assert (placed.device, placed.host) == (device * GB, 0)
    assert ("nothing is saved" not in placed.reason) is saves


def test_blocks_that_a_cache_always_computes_stay() -> None:
    assert place(on(), SIZES, GPU, keep_first=4).host == 6 * GB
    assert spread(10, 1.0, 4) == [4, 5, 6, 7, 8, 9]
    assert spread(10, 0.5) == [1, 3, 5, 7, 9]
    assert spread(10, 0.3, 9) == [9]
    assert spread(3, 0.5) == [1, 2] and spread(4, 0.0) == [] and spread(2, 1.0, 5) == []


@pytest.mark.parametrize(
    ("available", "form"),
    [
        (16, {"enabled": False}),
        (15, {"granularity": "block", "ratio": 0.3}),  # two slots for what three blocks save
        (10, {"granularity": "block", "ratio": 0.8}),
        (8, {"granularity": "block", "ratio": 1.0}),
        (7, {"granularity": "phase"}),
    ],
)
def test_auto_takes_the_mildest_form_that_fits(available: float, form: dict[str, Any]) -> None:
    placed = decided(available)
    chosen = placed.settings
    assert {key: getattr(chosen, key) for key in form} == form and chosen.lazy_load is False
    assert peak(placed) <= available * GB and placed.reason.startswith("auto: ")
    check_settings(chosen)


def test_auto_prefers_the_whole_model_where_other_stages_need_the_memory() -> None:
    def busy(placed: Placement) -> int:
        return max(WORK + placed.device, 10 * GB + placed.idle)

    placed = decide(AUTO, SIZES, GPU, peak=busy, available=14 * GB, host_free=100 * GB)
    assert placed.settings.granularity == "model"


def test_auto_reads_from_disk_where_the_host_is_small() -> None:
    assert decided(8, host=9).settings.lazy_load
    assert decided(8, host=9).settings.granularity == "block"
    with pytest.raises(UserError, match="no form of it fits"):
        decided(8, host=0.5)
    with pytest.raises(UserError, match="no form of it fits"):
        decided(6)


def test_auto_leaves_phases_out_with_compile() -> None:
    with pytest.raises(UserError):
        decided(7, compiled=True)


def test_auto_on_a_cpu_is_nothing_or_disk() -> None:
    assert not decided(16, device=CPU).settings.enabled
    placed = decided(10, device=CPU)
    assert placed.settings.lazy_load and placed.settings.ratio == 0.8


def test_what_is_named_is_not_changed() -> None:
    assert decided(1, settings=on(ratio=0.5)).settings.ratio == 0.5
    assert not decided(1, settings=OFF).settings.enabled


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "n": nn.LayerNorm(2)}) for _ in range(3))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


def test_sizes_are_measured_by_name() -> None:
    with torch.device("meta"):
        model = Model()
    weights = {f"layers.{i}.a": 1000 for i in range(3)} | {f"layers.{i}.n.weight": 10 for i in range(3)}
    weights["embed"] = 70
    assert measure(model, weights, 3100) == Sizes((1010,) * 3, part=1000, small=30, rest=70)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (OffloadConfig(lazy_load=True), {}, "offload is off"),
        (on(granularity="model", lazy_load=True), {}, "granularity is 'model'"),
        (on(granularity="model", ratio=0.5), {}, "share of the blocks"),
        (on(granularity="phase"), {"compiled": True}, "one graph"),
        (on(), {"graphs": True}, "offload moves them"),
        (AUTO, {"graphs": True}, "offload moves them"),
        (on(max_memory_gb=3.0), {}, "lazy_load"),
    ],
)
def test_contradictions_are_refused(settings: OffloadConfig, options: dict[str, bool], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(settings, **options)


def test_what_goes_together_is_not_refused() -> None:
    for settings in (OFF, AUTO, on(), on(granularity="phase", lazy_load=True), on(granularity="model")):
        check_settings(settings)
    check_settings(on(), compiled=True)
    check_settings(OFF, graphs=True)


@pytest.mark.parametrize("wrong", [{"ratio": -0.1}, {"ratio": 1.1}, {"workers": 0}, {"max_memory_gb": 0.0}])
def test_values_out_of_range_are_refused_by_the_configuration(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        on(**wrong)
