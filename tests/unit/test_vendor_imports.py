"""Optional packages that are missing, broken, or of another version: each is a reason, and nothing else breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightx2v import doctor
from lightx2v.mm.adapter import VendorLibrary
from lightx2v.mm.libraries import LIBRARIES, unavailable
from lightx2v.mm.scheme import parse
from lightx2v.platform import DeviceInfo, Probe, probe
from lightx2v.vendor import load
from tests.contracts import vendors

ROOT = Path(__file__).parents[2]
CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
HOPPER = DeviceInfo("cpu", 0, "a Hopper GPU", (9, 0), 1, 1)
VENDORS = ("vllm", "sgl_kernel", "sglang", "q8_kernels", "deep_gemm", "torchao")
OTHERS = ("flash_attn_interface", "marlin", "ixformer")  # transformers imports flash_attn itself where it finds one
FAILURES = {
    "ImportError": "raise ImportError('libcudart.so.12: cannot open shared object file')",
    "OSError": "raise OSError('undefined symbol:\\n  _ZN3c10')",
    "AssertionError": "assert False, 'no toolkit'",
    "SystemExit": "import sys; sys.exit('needs a device')",
    "ModuleNotFoundError": "import a_package_that_nobody_has",
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """The packages of the test alone, whether or not a real one is installed and imported."""

    def imported() -> dict[str, Any]:
        return {
            name: module for name, module in sys.modules.items() if name.partition(".")[0] in (*VENDORS, "a_vendor")
        }

    def clear() -> None:
        for name in imported():
            del sys.modules[name]
        vendors.forget()

    before = imported()
    clear()
    yield
    clear()
    sys.modules.update(before)


def write(folder: Path, names: tuple[str, ...], source: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(source, "utf-8")


def install(folder: Path, names: tuple[str, ...], source: str) -> None:
    """As `write`, with what pip notes down: transformers imports a package without that, to learn its version."""
    write(folder, names, source)
    for name in names:
        info = folder / f"{name}-0.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n", "utf-8")
        (info / "top_level.txt").write_text(f"{name}\n", "utf-8")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_package_that_fails_at_import_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str
) -> None:
    write(tmp_path, VENDORS, FAILURES[failure])
    monkeypatch.syspath_prepend(tmp_path)
    for library in map(LIBRARIES.__getitem__, LIBRARIES):
        if isinstance(library, VendorLibrary):
            reason = library.available(HOPPER)
            assert reason is not None and reason.startswith(f"{library.module} ")
            assert " is installed, but its import fails: " in reason
            assert f"{failure}: " in reason and "\n" not in reason
    for mm_type in ("int8-vllm", "fp8-sgl", "fp8-q8f", "fp8-b128-deepgemm", "int8-torchao"):
        assert "its import fails" in (unavailable(parse(mm_type).library, parse(mm_type), 256, 256, HOPPER) or "")
    assert unavailable("torch_native", parse("int8"), 256, 256, CPU) is None


def test_a_failed_import_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = tmp_path / "count"
    source = f"open({str(count)!r}, 'a').write('x')\nraise RuntimeError('broken')"
    write(tmp_path, ("a_vendor",), source)
    monkeypatch.syspath_prepend(tmp_path)
    assert {load("a_vendor:f").reason for _ in range(3)} == {
        "a_vendor unknown is installed, but its import fails: RuntimeError: broken"
    }
    assert count.read_text() == "x"


def test_what_has_moved_is_found_and_what_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "a_vendor"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "new.py").write_text("def f(): return 1")
    (package / "broken.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("a_vendor.old.deeper:f", "a_vendor.new:f").value() == 1
    gone = load("a_vendor.old:f", "a_vendor.new:g")
    assert gone.value is None
    assert gone.reason == "a_vendor unknown is installed, but has no f or g (another version: pip install a-vendor)"
    broken = load("a_vendor.broken:f")
    assert broken.reason and broken.reason.endswith("No module named 'a_package_that_nobody_has'")


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert probe("vllm").reason == "not installed"


def test_nothing_is_imported_for_a_device_that_cannot_run_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, ("vllm",), "raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = LIBRARIES["vllm"].available(CPU)
    assert reason == "needs compute capability 7.5 to 9.0 (int8), 8.9 or higher (fp8), a CPU has none"


def test_doctor_names_what_is_missing_and_the_device_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "list_devices", lambda: [CPU])
    monkeypatch.setattr(doctor, "probe", doctor_probe)
    report = doctor.examine()
    needs = {name: entry["needs"] for name, entry in report["kernels"].items()}
    assert needs["vllm"] == "compute capability 7.5 to 9.0 (int8), 8.9 or higher (fp8)"
    assert needs["deep_gemm"] == "compute capability 9.0 alone (fp8)"
    assert needs["torchao"] is None  # its int8 runs on CPUs
    assert report["kernels"]["vllm"] == {
        "version": None,
        "reason": "1.2.3 is installed, but no device here can run it",
        "install": None,
        "needs": needs["vllm"],
    }
    line = next(line for line in doctor.render(report).splitlines() if "deep_gemm" in line)
    assert "not installed; needs compute capability 9.0 alone (fp8); pip install " in line
    monkeypatch.setattr(doctor, "list_devices", lambda: [HOPPER, CPU])
    assert all(entry["needs"] is None for entry in doctor.examine()["kernels"].values())


def doctor_probe(module: str) -> Probe:
    if module == "vllm":
        return Probe(module, "1.2.3", None)
    return Probe(module, None, "not installed") if module in doctor.KERNELS else probe(module)


def test_everything_else_works_where_every_vendor_package_is_broken(tmp_path: Path) -> None:
    """In a process of its own: every module is imported, then doctor, explain and a product by "auto" run."""
    install(tmp_path, (*VENDORS, *OTHERS), "raise RuntimeError('broken on purpose')")
    script = """
import importlib, json, pkgutil, sys
import lightx2v
for module in pkgutil.walk_packages(lightx2v.__path__, "lightx2v."):
    # Peers and Triton's kernels import their package, and are imported on use.
    if not module.name.endswith("__main__") and ".peers" not in module.name and ".kernels." not in module.name:
        importlib.import_module(module.name)
assert not [name for name in sys.argv[1].split(",") if name in sys.modules], "imported at import time"
from lightx2v.cli import main
codes = [main(["doctor", "--json"])]
print("===")
codes += [main(["doctor"])]
for mm_type in ("int8", "fp8", "int8-torchao"):
    codes += [main(["explain", "--set", f"mm_config.mm_type={mm_type}", "--set", "mm_config.weight_auto_quant=true"])]
assert codes == [0, 0, 0, 0, 2], codes
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", script, ",".join(VENDORS)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.partition("===")[0])
    for name in ("vllm", "sgl_kernel", "q8_kernels", "deep_gemm", "torchao"):
        entry = report["kernels"][name]
        assert entry["version"] is None and entry["reason"] and (entry["install"] or entry["needs"]), name
    assert "broken on purpose" in report["kernels"]["torchao"]["reason"]
    assert "torchao: torchao 0.0.1 is installed, but its import fails: RuntimeError: broken on purpose" in run.stderr
