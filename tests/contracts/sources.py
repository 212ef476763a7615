"""Parameters of functions read from the source of a vendor's package, without importing it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

SOURCES = "LIGHTX2V_VENDOR_SOURCES"
"""Environment variable: folders that hold vendors' packages or clones of their repositories, separated as in PATH."""


def folders(module: str) -> Iterator[Path]:
    """Where to look for the files of `module`: the folders of the variable, and where it is installed."""
    for entry in filter(None, os.environ.get(SOURCES, "").split(os.pathsep)):
        yield Path(entry)
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parents[1]


def python_parameters(source: str, name: str) -> list[list[str]]:
    """The parameters of each definition of `name`, as "parameter" or "parameter=default"; aliases are followed."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                return python_parameters(source, node.value.id)
    return [
        _parameters(node.args) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    ]


def _parameters(args: ast.arguments) -> list[str]:
    named = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(named) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(named, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}" for arg, default in pairs]


def pybind_parameters(source: str, name: str) -> list[list[str]]:
    """The same for a function that C++ exports by `m.def`, or under a second name by `m.attr`."""
    alias = re.search(rf'm\.attr\("{name}"\)\s*=\s*m\.attr\("(\w+)"\)', source)
    found = re.search(rf'm\.def\("{alias[1] if alias else name}",(.*?)\);', source, re.DOTALL)
    if found is None:
        return []
    arguments = re.findall(r'py::arg\("(\w+)"\)(?:\s*=\s*("[^"]*"|[\w:]+))?', found[1])
    python = {"std::nullopt": "None", "false": "False", "true": "True"}
    return [
        [arg + (f"={python.get(value) or repr(value.strip(chr(34)))}" if value else "") for arg, value in arguments]
    ]


def read_parameters(folder: Path, file: str, name: str) -> list[list[str]]:
    """Parameters of every definition of `name` in `file` below `folder`; none where there is no such file."""
    path = folder / file
    if not path.is_file():
        return []
    source = path.read_text("utf-8")
    return python_parameters(source, name) if path.suffix == ".py" else pybind_parameters(source, name)
