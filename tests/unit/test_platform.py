from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightx2v import platform
from lightx2v.errors import ConfigError
from lightx2v.platform import DeviceInfo, install_hint, list_devices, probe, select_device

GPU = DeviceInfo("cuda", 0, "H", (9, 0), 80, 10)
OTHER_GPU = DeviceInfo("cuda", 1, "H", (9, 0), 80, 70)


def test_cpu_is_always_there_with_plausible_memory() -> None:
    cpu = list_devices()[-1]
    assert (cpu.kind, cpu.torch_name, cpu.capability) == ("cpu", "cpu", None)
    assert 2**28 < cpu.free_memory <= cpu.total_memory


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_accelerators", lambda: iter([GPU, OTHER_GPU]))
    assert select_device() == select_device("cuda") == GPU
    assert select_device("cuda:1") == OTHER_GPU
    assert select_device("cpu").kind == select_device("cpu:0").kind == "cpu"
    with pytest.raises(ConfigError, match=r"no 'cuda:2'") as caught:
        select_device("cuda:2")
    assert "cuda:0 (H)" in str(caught.value) and "cpu" in str(caught.value)


def test_selection_touches_no_device_beyond_the_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerators() -> Iterator[DeviceInfo]:
        yield GPU
        raise RuntimeError("out of memory")

    monkeypatch.setattr(platform, "_accelerators", accelerators)
    assert select_device("auto") == select_device("cuda:0") == GPU
    assert select_device("cpu").kind == "cpu"


@pytest.mark.parametrize(("hip", "kind", "capability"), [(None, "cuda", (9, 0)), ("6.4", "rocm", None)])
def test_accelerators_are_read_from_torch(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, kind: str, capability: tuple[int, int] | None
) -> None:
    import torch

    answers = {"is_available": True, "device_count": 2, "mem_get_info": (10, 80)}
    for name, answer in (answers | {"get_device_capability": (9, 0), "get_device_name": "H"}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert list_devices()[:-1] == [DeviceInfo(kind, index, "H", capability, 80, 10) for index in range(2)]


@pytest.mark.parametrize(("kind", "name"), [("cuda", "cuda:1"), ("rocm", "cuda:1"), ("xpu", "xpu:1"), ("mps", "mps")])
def test_torch_name(kind: str, name: str) -> None:
    assert DeviceInfo(kind, 1, "", None, 1, 1).torch_name == name


@pytest.mark.parametrize(
    ("limit", "usage", "cache_key"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_respects_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, usage: str, cache_key: str
) -> None:
    inner, outer = tmp_path / "inner", tmp_path
    inner.mkdir()
    (inner / limit).write_text("max\n")
    (outer / limit).write_text("1000\n")
    (outer / usage).write_text("700\n")
    (outer / "memory.stat").write_text(f"anon 600\n{cache_key} 100\n")
    monkeypatch.setattr(platform, "_cgroup_folders", lambda: iter([inner, outer]))
    assert platform._cgroup_memory(5000, 4000) == (1000, 400)
    assert platform._cgroup_memory(900, 800) == (900, 800)


def test_probe_tells_version_or_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe("pytest").version == pytest.__version__
    missing = probe("no_such_module_at_all")
    assert (missing.version, missing.reason) == (None, "not installed")
    fake = types.ModuleType("sgl_kernel")
    fake.__version__ = "9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel", fake)
    assert probe("sgl_kernel").version == "9.9"
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    assert probe("sgl_kernel").version is None


def test_probe_never_raises_and_never_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "explosive.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe("explosive") == platform.Probe("explosive", "unknown", None)

    def broken(name: str) -> importlib.machinery.ModuleSpec:
        raise ValueError("no spec")

    monkeypatch.setattr("importlib.util.find_spec", broken)
    assert probe("whatever").reason == "cannot be looked up: no spec"


def test_install_hints() -> None:
    assert install_hint("sgl_kernel") == "pip install sglang-kernel"
    assert install_hint("torchao") == "pip install torchao"
    assert "DeepGEMM" in install_hint("deep_gemm")


def test_cpu_peak_memory_sees_an_allocation() -> None:
    """In a process of its own: what other tests have freed could serve the allocation."""
    code = """
from lightx2v.platform import peak_memory, reset_peak_memory, select_device
cpu = select_device("cpu")
large = b"x" * 2**27
del large
reset_peak_memory(cpu)
before = peak_memory(cpu)
block = b"x" * 2**26
print(before, peak_memory(cpu))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert 2**25 <= after - before <= 2**27


def test_import_needs_no_torch() -> None:
    code = "import sys, lightx2v.platform; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
