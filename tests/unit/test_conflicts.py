"""Settings that exclude each other are refused before anything is read; features and families stay apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError
from lightx2v.models.spec import FAMILIES
from lightx2v.plan.conflicts import check_together
from lightx2v.plan.matrix import AXES, RUNS, pairs, refusal
from lightx2v.plan.matrix_page import page

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightx2v"
MAGCACHE = {"cache.type": "magcache", "sampling.denoising_step_list": [1000, 700, 300]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"graphs": True, "offload.enabled": True}, "graphs", "offload moves them"),
    ({"graphs": True, "offload.enabled": "auto"}, "graphs", "offload moves them"),
    ({"graphs": True, "cache.type": "pab"}, "cache.type", "pab does not go with graphs true"),
    ({"compile": True, "offload.enabled": True, "offload.granularity": "phase"}, "offload.granularity", "one graph"),
    ({"offload.lazy_load": True}, "offload.lazy_load", "offload is off"),
    (MAGCACHE, "cache.type", r"magcache does not go with .*\[1000, 700, 300\]"),
    ({**MAGCACHE, "cache.ratios": [1.0, 0.9]}, "cache.type", "measured"),
    ({**MAGCACHE, "cache.ratios": [[1.0, 0.9], [1.0, 0.9]]}, "cache.type", "measured"),
]
ACCEPTED: list[dict[str, Any]] = [
    {**MAGCACHE, "cache.ratios": [1.0, 0.9, 0.8]},
    {**MAGCACHE, "cache.ratios": [[1.0, 0.9, 0.8], [1.0, 0.9, 0.9]]},
    {**MAGCACHE, "cache.file": "measured.json"},
    {"cache.type": "magcache"},
    {"graphs": True, "cache.type": "dbcache", "compile": True},
    {"offload.enabled": True, "offload.granularity": "phase", "cache.type": "fora"},
]
FEATURES = {"cache", "caches", "compile", "graphs", "lora", "loras", "offload", "teacache", "magcache", "taylorseer"}


@pytest.mark.parametrize(("settings", "where", "what"), REFUSED)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as raised:
        check_together(load_config(None, settings))
    assert raised.value.where == where and (raised.value.do or raised.value.allowed)


@pytest.mark.parametrize("settings", ACCEPTED)
def test_what_goes_together_is_not(settings: dict[str, Any]) -> None:
    check_together(load_config(None, settings))


def test_the_page_is_what_the_code_gives() -> None:
    assert (ROOT / "docs" / "features.md").read_text("utf-8") == page()


def test_every_model_is_in_the_matrix() -> None:
    assert {FAMILIES[family].dit for family in RUNS} == {FAMILIES[family].dit for family in FAMILIES}


def test_every_form_works_alone() -> None:
    assert [value.name for family in RUNS for axis in AXES for value in axis.values if refusal(family, value)] == []


def test_a_pair_is_there_once() -> None:
    names = [frozenset(value.name for value in pair) for pair in pairs()]
    assert len(names) == len(set(names)) and all(len(pair) == 2 for pair in names)


def words(path: Path) -> Iterator[str]:
    """The words of a module's code: names, and texts other than docstrings; a_b is one word, a.b are two."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        texts = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        if isinstance(node, ast.Constant) and id(node) in docs:
            continue
        for text in texts:
            yield from re.findall(r"\w+", text.lower())


def naming(folders: tuple[str, ...], forbidden: set[str]) -> list[str]:
    modules = [path for folder in folders for path in sorted((PACKAGE / folder).rglob("*.py"))]
    assert modules
    return [f"{path.relative_to(ROOT)}: {word}" for path in modules for word in sorted({*words(path)} & forbidden)]


def family_folders() -> list[str]:
    return sorted(path.parent.name for path in (PACKAGE / "models").glob("*/spec.py"))


def test_no_feature_names_a_family() -> None:
    families = {word for name in (*FAMILIES, *family_folders()) for word in (name, name.rstrip(".0123456789"))}
    assert {"wan", "flux"} <= families
    assert naming(("features",), {*families, "wan2", "wandit", "fluxdit"}) == []


def test_no_family_names_a_feature() -> None:
    folders = ("families", *(f"models/{name}" for name in family_folders()))
    assert naming(folders, FEATURES) == []


def test_import_contracts_know_every_family() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    contract = text.partition('name = "no feature knows a family"')[2].partition("[[")[0]
    assert all(f'"lightx2v.models.{name}"' in contract for name in family_folders())
