"""Compile the kernels of `src/` for this CPU, once, and load them.

The library is kept in the user's cache folder under a name made of everything that it depends on. It calls oneDNN's
block products inside libtorch_cpu and shares torch's OpenMP threads, so it is linked against torch's own libraries.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from loguru import logger

from lightx2v.errors import LightX2VError
from lightx2v.platform import cache_folder

SOURCES = Path(__file__).parent / "src"
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"),
    # Results must not depend on how the compiler contracts products and sums; no kernel reads errno or FP exceptions.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled library, or the reason why there is none; and which products work on this CPU."""

    library: ctypes.CDLL | None
    reason: str | None
    int8: bool = False
    bfloat16: bool = False

    def lacks(self, product: Literal["int8", "bfloat16"]) -> str | None:
        """Why the kernels that multiply in `product` cannot run here; None when they can."""
        works = self.int8 if product == "int8" else self.bfloat16
        return self.reason or (None if works else "this CPU, or this torch, lacks oneDNN's block product")


_known: Kernels | None = None


def kernels() -> Kernels:
    """Compile if need be, load, and find out what works. Never raises: without kernels the engine uses torch's."""
    # A plain variable and no lru_cache: torch.compile looks through the cache and would trace the compilation.
    global _known
    if _known is None:
        _known = _find()
    return _known


def _find() -> Kernels:
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, LightX2VError) as error:
        return Kernels(None, str(error))
    library.lx_supports.restype = ctypes.c_int
    works = library.lx_supports()
    return Kernels(library, None, int8=bool(works & 1), bfloat16=bool(works & 2))


def _built() -> Path:
    if sys.platform != "linux":
        raise LightX2VError("CPU kernels", f"are compiled on Linux only, this is {sys.platform}")
    compiler = _compiler()
    sources = sorted(SOURCES.iterdir())
    name = hashlib.sha256()
    for part in (*_FLAGS, _version(compiler), torch.__version__, str(_torch_folder()), _cpu_features()):
        name.update(part.encode() + b"\0")
    for source in sources:
        name.update(source.read_bytes())
    target = cache_folder() / f"kernels-{name.hexdigest()[:20]}.so"
    if not target.exists():
        _compile(compiler, [source for source in sources if source.suffix == ".cpp"], target)
    return target


def _compiler() -> str:
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise LightX2VError("CPU kernels", "no C++ compiler is installed", do="install g++ or clang++")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _cpu_features() -> str:
    """What "-march=native" means here: a home folder may be shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    features = (line for line in lines if line.startswith(("model name", "flags", "Features")))
    return platform.machine() + "".join(list(dict.fromkeys(features)))


def _torch_folder() -> Path:
    return Path(torch.__file__).parent / "lib"


def _openmp() -> list[str]:
    """The OpenMP library that torch itself has loaded: a second one would keep threads of its own, spinning."""
    folder = _torch_folder()
    places = (folder, folder.parent.parent / "torch.libs")
    own = [str(file) for place in places for file in sorted(place.glob("libgomp*.so*"))]
    return own[:1] or ["-fopenmp"]


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    """Compile `sources` into `target`, which appears whole or not at all."""
    logger.info("compiling the CPU kernels, once: {}", target)
    folder = _torch_folder()
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        objects = []
        for source in sources:
            objects.append(f"{work}/{source.stem}.o")
            _run([compiler, *_FLAGS, "-c", str(source), "-o", objects[-1]])
        whole = f"{work}/kernels.so"
        links = [f"-L{folder}", "-ltorch_cpu", "-lc10", *_openmp(), f"-Wl,-rpath,{folder}"]
        _run([compiler, "-shared", *objects, "-o", whole, *links])
        os.replace(whole, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise LightX2VError("CPU kernels", f"{Path(command[0]).name} failed: {first.strip()}")
