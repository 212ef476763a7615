"""Rules about the files of this repository that no linter checks."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from lightx2v.config.load import load_config

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightx2v"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.json") if path.name != "schema.json")
SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]
SOURCED = ROOT / "scripts" / "lib"
TEXT = {".cfg", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}

MAX_LINES = 500
VENDOR = {
    "deep_gemm", "flash_attn", "flash_attn_interface", "lpips", "q8_kernels", "sageattention", "sgl_kernel", "torchao",
    "vllm", "xformers",
}  # fmt: skip
MACHINE_PATH = re.compile(r"""(?:^|[\s"'`=(:@])/(?:data|home|mnt|opt|root|tmp|Users|work|workspace)/\w""", re.MULTILINE)
REGISTRY = re.compile(r"--(?:extra-)?index-url|--find-links|https?://[^\s\"']*/simple\b|pythonhosted|download\.pytorch")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked_files() -> list[Path]:
    """What git has or would add; every file where there is no git, as in an archive."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode != 0:
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return [path for path in (ROOT / entry for entry in listing.stdout.split("\0") if entry) if path.is_file()]


def test_no_module_is_too_long() -> None:
    lengths = {name(path): len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert {path: count for path, count in lengths.items() if count > MAX_LINES} == {}


def test_only_platform_names_the_vendor_of_a_device() -> None:
    found = [name(path) for path in MODULES if path.name != "platform.py" and "cuda" in path.read_text("utf-8").lower()]
    assert found == []


def module_imports(tree: ast.Module) -> list[str]:
    """Top-level names of the modules that are imported when this one is; `if TYPE_CHECKING` does not count."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return [imported.partition(".")[0] for imported in names]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_are_plain(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    stars = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert not stars, "star import"
    tried = [node for node in tree.body if isinstance(node, ast.Try)]
    assert not [n for t in tried for n in ast.walk(t) if isinstance(n, ast.Import | ast.ImportFrom)], (
        "module-level try around an import: ask platform.probe, and import in a function"
    )
    assert not VENDOR.intersection(module_imports(tree)), "vendor library imported at module level"


def test_no_path_of_one_machine_and_no_registry_in_the_tree() -> None:
    found = []
    for path in tracked_files():
        if path.suffix not in TEXT or path == Path(__file__) or "assets" in path.parts:
            continue
        text = path.read_text("utf-8")
        found += [
            f"{name(path)}: {match[0].strip()}" for rule in (MACHINE_PATH, REGISTRY) for match in rule.finditer(text)
        ]
    assert found == []


def test_there_are_configs_of_both_kinds() -> None:
    assert {path.parent.name for path in CONFIGS} >= {"quantization", "wan"}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_loads_and_names_the_schema(path: Path) -> None:
    schema = json.loads(path.read_text("utf-8"))["$schema"]
    assert (path.parent / schema).resolve() == ROOT / "configs" / "schema.json"
    load_config(str(path))


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_script_parses_and_can_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.is_relative_to(SOURCED) or path.stat().st_mode & 0o100, "not executable"


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
