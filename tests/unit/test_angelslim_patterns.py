"""Which layers AngelSlim's rules on names take, and where ours are stricter than its."""

from __future__ import annotations

import re

import pytest

from lightx2v.errors import ConfigError
from lightx2v.integrations.angelslim.patterns import EXCLUDE, INCLUDE, NameFilter, compile_pattern
from lightx2v.integrations.diffusers import DynamicDiTQuantizer
from tests.unit.angelslim_nets import BLOCKS, seeded


def test_the_defaults_on_names_of_flux_and_wan() -> None:
    names = NameFilter.of(INCLUDE, EXCLUDE)
    taken = [
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.3.proj_mlp",
        "norm_out.linear",
        "blocks.0.ffn.net.0.proj",
        "double_blocks.0.img_mod.lin",
        "TXT_in",
    ]
    left = ["proj_out", "x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1"]
    left += ["condition_embedder.time_proj", "blocks.0.Embed.proj"]
    assert [name for name in taken + left if names(name)] == taken


def test_exclusion_comes_first_and_nothing_to_include_means_all() -> None:
    names = NameFilter.of([], ["norm"])
    assert names("anything.at.all") and not names("blocks.0.NORM.proj")
    both = NameFilter.of(["attn"], ["attn"])
    assert not both("blocks.0.attn")
    assert both.against("blocks.0.attn") == "excluded by 'attn'"


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("Linear", "a.linear1", True),
        (r".*\.linear\d+", "a.linear1", True),
        (r".*\.linear\d+", "a.linear", False),
        (r".*\.attn.*", "blocks.0.ATTN.q", True),
        ("to_q|to_k", "attn.to_k", True),
        ("to_[qk]$", "attn.to_k.x", False),
        (re.compile("attn"), "ATTN", False),
        (re.compile("attn", re.IGNORECASE), "ATTN", True),
        ("net.2", "blocks.0.ffn.net.2", True),
        ("blocks.0.", "blocks.0.attn", True),
        ("blocks.0.", "single_blocks.0.attn", True),
        ("1.attn", "blocks.11.attn", False),
        ("attn.to", "blocks.1.attn.to_q", True),
        ("block1", "block10", True),
    ],
)
def test_a_pattern_is_searched_for(pattern: str | re.Pattern[str], name: str, found: bool) -> None:
    assert bool(compile_pattern(pattern).search(name)) is found


def test_defect_9_dots_of_a_plain_name_are_dots() -> None:
    """AngelSlim takes any string with a dot for a regular expression: 'block.1' finds block.10 and blockX1 there."""
    names = NameFilter.of(["block.1"], [])
    assert names("block.1") and names("single_block.1.attn.to_q")
    assert not names("block.10") and not names("block.12.attn") and not names("blockX1")


def test_defect_7_an_empty_list_is_taken_at_its_word() -> None:
    """AngelSlim replaces [] by its own list."""
    everything = DynamicDiTQuantizer(include_patterns=[], exclude_patterns=[])
    model = seeded()
    everything.convert_linear(model)
    assert everything.report is not None
    assert set(everything.report.matched) == {"patch_embed", *BLOCKS, "head"}
    usual = DynamicDiTQuantizer(include_patterns=[])
    usual.convert_linear(seeded())
    assert usual.report is not None
    assert set(usual.report.matched) == {*BLOCKS, "head"}


def test_a_filter_of_the_caller_replaces_the_patterns() -> None:
    quantizer = DynamicDiTQuantizer(layer_filter=lambda name: name == "head", exclude_patterns=["head"])
    quantizer.convert_linear(seeded())
    assert quantizer.report is not None and list(quantizer.report.matched) == ["head"]
    assert quantizer.report.skipped["patch_embed"] == "layer_filter leaves it out"


@pytest.mark.parametrize(
    ("patterns", "said"),
    [(["a[b"], "no regular expression"), ([7], "no pattern"), ("lin", "single pattern"), (re.compile("x"), "single")],
)
def test_what_is_no_list_of_patterns_is_refused(patterns: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DynamicDiTQuantizer(include_patterns=patterns)  # type: ignore[arg-type]
