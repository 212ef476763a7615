"""From the `cache` section to a method; what cannot be had is told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightx2v.config.features import CacheConfig
from lightx2v.errors import ConfigError
from lightx2v.features.cache import READS, Calibration, Facts, build
from lightx2v.features.cache.custom import Custom
from lightx2v.features.cache.dbcache import DBCache
from lightx2v.features.cache.gate import CfgGate
from lightx2v.features.cache.magcache import MagCache
from lightx2v.features.cache.pab import Pab
from lightx2v.features.cache.taylorseer import TaylorSeer
from lightx2v.features.cache.teacache import TeaCache

WAN = Facts("wan2.1", "t2v", 1536, 30, 480 * 832, time_signal=True, recallable=frozenset({"self", "cross", "mlp"}))
TINY = replace(WAN, width=256, blocks=4)
FLUX = Facts("flux", "t2i", 3072, 57, 1024 * 1024, recallable=frozenset({"self", "mlp"}), cfg=False)


def made(facts: Facts = WAN, **options: Any) -> Any:
    return build(CacheConfig(**options), facts)


def refused(facts: Facts = WAN, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        made(facts, **options)
    return str(error.value)


def test_no_method_is_no_cache() -> None:
    assert made() is None


@pytest.mark.parametrize("method", READS)
def test_every_method_has_defaults_for_a_known_model(method: str) -> None:
    cache = made(type=method)
    assert cache.method == cache.report.method == method
    assert cache.kept_streams(30) >= 0


def test_published_numbers_are_found() -> None:
    tea = made(type="teacache")
    assert isinstance(tea, TeaCache) and tea.coefficients[-1] == 1.37887774e-1 and tea.threshold == 0.26
    assert made(type="teacache", use_ret_steps=True).coefficients[-1] == -4.99875664e-2
    assert made(FLUX, type="teacache").coefficients[-1] == 2.64230861e-1
    assert made(FLUX, type="magcache").ratios["cond"][1] == 1.21094


def test_options_reach_the_method() -> None:
    custom = made(type="custom", coefficients=((1.0, 2.0), (3.0, 4.0)), threshold=0.1)
    assert isinstance(custom, Custom) and custom.order == 1 and custom.coefficients == (3.0, 4.0)
    assert made(type="teacache", coefficients=((1.0,), (3.0,)), use_ret_steps=True).coefficients == (1.0,)
    assert made(type="teacache", coefficients=(5.0, 6.0, 7.0)).coefficients == (5.0, 6.0, 7.0)
    mag = made(type="magcache", ratios=((1.0, 0.9), (1.0, 0.8)), max_skip=4, retention=0.5, threshold=0.2)
    assert isinstance(mag, MagCache) and mag.ratios == {"cond": (1.0, 0.9), "uncond": (1.0, 0.8)}
    assert (mag.max_skip, mag.retention, mag.threshold) == (4, 0.5, 0.2)
    taylor = made(replace(WAN, dtype=torch.bfloat16), type="taylorseer", interval=6, order=2, warmup=3, store="fp8")
    assert isinstance(taylor, TaylorSeer) and (taylor.interval, taylor.order, taylor.warmup) == (6, 2, 3)
    assert (taylor.holding.dtype, taylor.holding.store) == (torch.bfloat16, "fp8")
    dual = made(type="dbcache", first_blocks=3, last_blocks=2, warmup=1, max_cached=9, max_continuous=2, taylor=True)
    assert isinstance(dual, DBCache) and (dual.first_blocks, dual.last_blocks, dual.order) == (3, 2, 1)
    assert (dual.warmup, dual.max_cached, dual.max_continuous) == (1, 9, 2)
    assert not dual.separate and made(type="fbcache", cfg_separate=True).separate
    mag = made(type="magcache", taylor=True, cfg_separate=True)
    assert (mag.order, mag.separate) == (1, True)
    pab = made(type="pab", interval=4, window=(50, 900))
    assert isinstance(pab, Pab) and pab.intervals == {"self": 4, "cross": 12} and pab.window == (50, 900)


def test_first_blocks_are_fewer_in_a_short_stack() -> None:
    assert made(type="dbcache").first_blocks == 8
    assert made(TINY, type="dbcache").first_blocks == 1


def test_a_model_without_numbers_is_told_how_to_get_them() -> None:
    for method in ("teacache", "custom", "magcache"):
        message = refused(TINY, type=method)
        assert "none for this model (wan2.1 t2v, width 256, 4 blocks)" in message
        assert "lightx2v calibrate --cache --save FILE" in message and "cache.file" in message
    assert "cache.coefficients" in refused(type="teacache", coefficients=((), (1.0,)), use_ret_steps=True)
    assert "none for this model" in refused(type="magcache", ratios=((1.0, 0.9), ()))


def test_an_option_that_the_method_does_not_read_names_those_it_reads() -> None:
    message = refused(type="taylorseer", threshold=0.1)
    assert "cache.threshold" in message and "allowed: interval, order, warmup, lite" in message
    assert "allowed: threshold, warmup" in refused(type="easycache", interval=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"type": "teacache", "threshold": 2.5}, "0 to 2"),
        ({"type": "fbcache", "threshold": 1.5}, "0 to 1"),
        ({"type": "dbcache", "first_blocks": 20, "last_blocks": 10}, "20 first and 10 last blocks are all of 30"),
        ({"type": "magcache", "ratios": (1.0, 0.0)}, "not above 0"),
        ({"type": "magcache", "ratios": ((1.0,), (1.0,), (1.0,))}, "has 3 entries"),
        ({"type": "teacache", "coefficients": (1.0, (2.0,))}, "has 2 entries"),
        ({"type": "easycache", "store": "fp8"}, "cache.store"),
        ({"type": "taylorseer", "lite": True, "store": "fp8"}, "cache.store"),
        ({"type": "teacache", "coefficients": (1.0,), "file": "x.json"}, "beside cache.coefficients"),
        ({"type": "magcache", "file": "missing.json"}, "cannot be read"),
        ({"type": "pab", "window": (800, 100)}, "800 to 100"),
        ({"type": "adacache", "codebook": ()}, "cache.codebook"),
        ({"type": "adacache", "codebook": ((0.2, 3), (0.1, 1))}, "rising"),
        ({"type": "adacache", "codebook": ((0.2, 0),)}, "1 or more"),
        ({"type": "deepcache"}, "not for a native transformer"),
        ({"type": "fora", "cfg_interval": 3}, "without cache.cfg_gate"),
    ],
)
def test_bad_options(options: dict[str, Any], told: str) -> None:
    assert told in refused(**options)


def test_ret_steps_need_a_signal_of_time() -> None:
    assert "cache.use_ret_steps" in refused(FLUX, type="teacache", use_ret_steps=True)


def test_the_gate_is_around_a_method_or_alone() -> None:
    gate = build(CacheConfig(type="fora", cfg_gate=0.5), WAN)
    assert isinstance(gate, CfgGate) and gate.method == "fora + cfg_gate" and gate.share == 0.5
    assert made(type="fbcache", cfg_gate=0.5).first_blocks == 1
    alone = build(CacheConfig(cfg_gate=0.5), WAN)
    assert isinstance(alone, CfgGate) and alone.cache is None
    with pytest.raises(ConfigError, match=r"cache\.cfg_gate"):
        build(CacheConfig(cfg_gate=0.5), FLUX)


def test_adacache_takes_a_codebook() -> None:
    ada = made(type="adacache", codebook=((0.1, 3), (1.0, 1)), motion=True)
    assert ada.codebook == ((0.1, 3), (1.0, 1)) and ada.motion


def test_a_single_block_has_nothing_behind_the_first() -> None:
    assert "all of 1" in refused(replace(WAN, blocks=1), type="fbcache")


def test_blocks_that_offer_nothing() -> None:
    assert "offer nothing to recall" in refused(replace(WAN, recallable=frozenset()), type="fora")
    assert "offer nothing to recall" in refused(replace(WAN, recallable=frozenset({"mlp"})), type="pab")


MEASURED = Calibration(
    "wan2.1", "t2v", 256, 4, 20, 3, (1.0, 2.0), (3.0, 4.0), {"cond": (1.0, 0.9), "uncond": (1.0, 0.8)}
)


def test_a_calibration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    MEASURED.write(path)
    assert Calibration.read(path) == MEASURED
    assert made(TINY, type="teacache", file=str(path)).coefficients == (1.0, 2.0)
    assert made(TINY, type="custom", use_ret_steps=True, file=str(path)).coefficients == (3.0, 4.0)
    assert made(TINY, type="magcache", file=str(path)).ratios["uncond"] == (1.0, 0.8)


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    MEASURED.write(path)
    message = refused(WAN, type="teacache", file=str(path))
    assert "measured with wan2.1 t2v, width 256, 4 blocks" in message and "width 1536, 30 blocks" in message


FORMAT = "lightx2v cache calibration 1"


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": "other"}', "no JSON", f'{{"format": "{FORMAT}", "ratios": {{}}, "head": null}}']
)
def test_a_file_that_is_no_calibration(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert "cache.file" in refused(TINY, type="magcache", file=str(path))
