"""Devices and installed libraries. The only file that names a vendor's device type; torch is imported on use."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import resource
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightx2v.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceInfo:
    """One device. Memory is in bytes; for the CPU it is RAM, within the limit of the control group."""

    kind: str
    """"cpu", "cuda", "rocm", "xpu" or "mps"."""
    index: int
    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None for every other kind."""
    total_memory: int
    free_memory: int

    @property
    def torch_name(self) -> str:
        """What `torch.device` takes. ROCm devices go by CUDA's name there."""
        if self.kind in ("cpu", "mps"):
            return self.kind
        return f"{'cuda' if self.kind == 'rocm' else self.kind}:{self.index}"


@dataclass(frozen=True)
class Probe:
    """Whether a module is installed: `version` is None exactly when `reason` says why not."""

    module: str
    version: str | None
    reason: str | None


@dataclass(frozen=True)
class _Library:
    distributions: tuple[str, ...]
    install: str


def _source(url: str) -> str:
    return f"pip install --no-build-isolation 'git+https://github.com/{url}'"


_LIBRARIES = {
    # Releases from 0.4 on go by the longer name; the module kept its own.
    "sgl_kernel": _Library(("sglang-kernel", "sgl-kernel"), "pip install sglang-kernel"),
    "q8_kernels": _Library(("q8-kernels",), _source("KONAKONA666/q8_kernels")),
    "deep_gemm": _Library(("deep-gemm",), _source("deepseek-ai/DeepGEMM")),
    "triton": _Library(("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"), "pip install triton"),
    "flash_attn": _Library(("flash-attn",), "pip install --no-build-isolation flash-attn"),
    "flash_attn_interface": _Library(
        ("flash-attn-3", "flashattn-hopper"), _source("Dao-AILab/flash-attention#subdirectory=hopper")
    ),
    "flash_attn.cute": _Library(("flash-attn-4",), "pip install flash-attn-4"),
    "sageattention": _Library(("sageattention",), _source("thu-ml/SageAttention")),
    "sageattn3": _Library(("sageattn3",), _source("thu-ml/SageAttention#subdirectory=sageattention3_blackwell")),
    "spas_sage_attn": _Library(("spas-sage-attn",), _source("thu-ml/SpargeAttn")),
}


def package_of(module: str) -> str:
    """What is installed to have `module`: its top-level package, or a part of one that is distributed by itself."""
    return next(
        (name for name in _LIBRARIES if f"{module}.".startswith(f"{name}.") and "." in name), module.split(".")[0]
    )


def gpu_symbol(stem: str, suffix: str = "") -> str:
    """The name of a package's function that it calls after the vendor of the GPU: `stem`, that, `suffix`."""
    return f"{stem}_cuda{suffix}"


def _spec(module: str) -> ModuleSpec | None:
    """Where `module` is; its parents are not imported, which `importlib.util.find_spec` would do."""
    top, *parts = module.split(".")
    imported = sys.modules.get(top)
    spec = None if parts and imported else importlib.util.find_spec(top)
    folders = getattr(imported, "__path__", ()) if spec is None else spec.submodule_search_locations
    for part in parts:
        top = f"{top}.{part}"
        spec = PathFinder.find_spec(top, list(folders or ()))
        folders = spec.submodule_search_locations if spec else None
    return spec


def probe(module: str) -> Probe:
    """Look for `module`, a package of `package_of`, without importing it. Never raises."""
    try:
        spec = None if module in sys.modules else _spec(module)
        # A folder of that name without Python files in it, say a clone's, is found as well: it has no origin.
        found = module in sys.modules or (spec is not None and spec.origin is not None)
    except (ImportError, ValueError) as error:
        return Probe(module, None, f"cannot be looked up: {error}")
    if not found or sys.modules.get(module, module) is None:
        return Probe(module, None, "not installed")
    for distribution in _LIBRARIES[module].distributions if module in _LIBRARIES else (module,):
        try:
            return Probe(module, importlib.metadata.version(distribution), None)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Probe(module, str(getattr(sys.modules.get(module), "__version__", "unknown")), None)


def install_hint(module: str) -> str:
    """The command that installs `module`."""
    return _LIBRARIES[module].install if module in _LIBRARIES else f"pip install {module.replace('_', '-')}"


def cache_folder() -> Path:
    """Where compiled kernels and measurements are kept: `lightx2v` in the user's cache, or else a temporary folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "lightx2v"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _temporary_folder()


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="lightx2v-"))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _cgroup_folders() -> Iterator[Path]:
    """The folders of this process's memory control group and of its parents, for cgroup v2 and v1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            inside = root / path.lstrip("/")
            yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(root))


def _cgroup_memory(total: int, free: int) -> tuple[int, int]:
    """`total` and `free` bytes of RAM cut to every limit of the control groups."""
    for folder in _cgroup_folders():
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file "),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        ):
            limit, usage = _read_int(folder / limit_file), _read_int(folder / usage_file)
            if limit is None or limit >= total:
                continue
            stat = folder / "memory.stat"
            lines = stat.read_text().splitlines() if stat.is_file() else []
            cache = next((int(line.split()[1]) for line in lines if line.startswith(cache_key)), 0)
            total, free = limit, min(free, max(0, limit - (usage or 0) + cache))
    return total, free


def _proc_kilobytes(path: str, key: str) -> int | None:
    """The bytes behind `key` in one of Linux's /proc tables; None elsewhere."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _cpu() -> DeviceInfo:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total, free = _cgroup_memory(ram, _proc_kilobytes("/proc/meminfo", "MemAvailable") or ram)
    return DeviceInfo("cpu", 0, _cpu_name(), None, total, free)


def _cpu_name() -> str:
    """The model as Linux or the platform module tells it, such as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _accelerators() -> Iterator[DeviceInfo]:
    if probe("torch").version is None:
        return
    import torch

    if torch.cuda.is_available():
        kind = "rocm" if torch.version.hip else "cuda"
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = torch.cuda.get_device_capability(index) if kind == "cuda" else None
            yield DeviceInfo(kind, index, torch.cuda.get_device_name(index), capability, total, free)
    if torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            free, total = torch.xpu.mem_get_info(index)
            yield DeviceInfo("xpu", index, torch.xpu.get_device_name(index), None, total, free)
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.driver_allocated_memory()
        yield DeviceInfo("mps", 0, platform.machine(), None, total, free)


def _devices() -> Iterator[DeviceInfo]:
    yield from _accelerators()
    yield _cpu()


def list_devices() -> list[DeviceInfo]:
    """Every device there is, the best kind first and the CPU last."""
    return list(_devices())


def select_device(name: str = "auto") -> DeviceInfo:
    """The device called `name`: "auto" (the best there is), a kind ("cuda"), or a kind and an index ("cuda:1").

    Devices after the chosen one are not touched, for asking a GPU for its memory takes some of it; "cpu" touches none.
    Raises ConfigError when the device is not there.
    """
    wanted = name if ":" in name else f"{name}:0"
    for device in [_cpu()] if wanted == "cpu:0" else _devices():
        if name == "auto" or wanted in (f"{device.kind}:{device.index}", device.torch_name):
            return device
    there = ", ".join(f"{d.torch_name} ({d.name})" for d in list_devices())
    raise ConfigError("device", f"there is no '{name}' here", allowed=f"auto, {there}")


def _backend(device: DeviceInfo) -> Any:
    import torch

    return {"cuda": torch.cuda, "rocm": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}[device.kind]


def compiler_for(device: DeviceInfo) -> str | None:
    """Why torch.compile cannot make code for `device`: it needs a C++ compiler for CPUs and Triton for GPUs."""
    if device.kind == "cpu":
        found = any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))
        return None if found else "no C++ compiler is installed (install g++)"
    if device.kind == "mps":
        return None  # inductor writes Metal, whose compiler is part of macOS
    reason = probe("triton").reason
    return f"triton is {reason} ({install_hint('triton')})" if reason else None


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """The CUDA compute capability of a torch device; None for one that has none."""
    import torch

    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for any other."""
    import torch

    return 1 if device.type != "cuda" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def device_name(device: torch.device) -> str:
    """What the maker calls a torch device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def graph_recorder(device: DeviceInfo) -> Callable[[], AbstractContextManager[Any]] | None:
    """What records the work done inside a `with` block as a graph with `replay()`; None where there are no graphs."""
    if device.kind not in ("cuda", "rocm"):
        return None
    import torch

    @contextmanager
    def record() -> Iterator[Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph

    return record


def synchronize(device: DeviceInfo) -> None:
    """Wait until all work queued on `device` is done."""
    if device.kind != "cpu":
        _backend(device).synchronize(*(() if device.kind == "mps" else (device.index,)))


@contextmanager
def forbid_host_waits(device: DeviceInfo) -> Iterator[None]:
    """Inside, what makes the host wait for `device` raises RuntimeError, as far as torch can tell: on NVIDIA GPUs."""
    if device.kind != "cuda":
        yield
        return
    import torch

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def empty_cache(device: DeviceInfo) -> None:
    """Give the allocator's unused memory back to the device."""
    if device.kind == "cpu":
        trim_memory()
    else:
        _backend(device).empty_cache()


def trim_memory() -> None:
    """Give what Python has freed back to the system, where the C library is glibc, which keeps it otherwise.

    It counts blocks of up to 32 MB, such as the weights of a layer, as small ones that it may want again.
    """
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


@lru_cache(maxsize=1)
def _c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "malloc_trim") else None
    except OSError:
        return None


def peak_memory(device: DeviceInfo) -> int:
    """Bytes: most that tensors took since `reset_peak_memory`; resident memory on the CPU; on MPS what is taken now."""
    if device.kind == "mps":
        return int(_backend(device).driver_allocated_memory())
    if device.kind != "cpu":
        return int(_backend(device).max_memory_allocated(device.index))
    # getrusage counts in bytes on macOS and in kilobytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    most = _proc_kilobytes("/proc/self/status", "VmHWM")
    return most if most is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: DeviceInfo) -> None:
    """Start `peak_memory` anew. On a CPU this needs Linux; elsewhere the peak is the process's."""
    if device.kind == "cpu":
        clear = Path("/proc/self/clear_refs")
        if os.access(clear, os.W_OK):
            clear.write_text("5")  # resets VmHWM, see proc(5)
    elif device.kind != "mps":
        _backend(device).reset_peak_memory_stats(device.index)


def host_memory(nbytes: int, device: DeviceInfo) -> torch.Tensor:
    """uint8 [nbytes] of host memory, page-locked where copies to `device` then run beside its work.

    It is mapped for itself, so that all of it goes back to the system, and registered rather than taken from torch's
    allocator of such memory, which rounds every size up to a power of two. Raises ResourceError for lack of it.
    """
    import torch

    with torch.inference_mode(False):
        if device.kind == "xpu":
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        try:
            pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
        except OSError as error:
            raise ResourceError("memory", f"the host has no {nbytes:,} bytes left ({error})") from error
    if device.kind in ("cuda", "rocm") and nbytes:
        runtime, address = torch.cuda.cudart(), memory.data_ptr()
        if problem := int(runtime.cudaHostRegister(address, nbytes, 0)):
            raise ResourceError(
                "memory", f"{nbytes:,} bytes of host memory cannot be page-locked (error {problem})", do="see ulimit -l"
            )
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory


class CopyQueue:
    """Copies from host memory to a device on a stream of their own. Marks order them; the host waits for none.

    On a CPU, and on MPS, whose memory is the host's, a copy is done when it returns, and marks are None.
    """

    def __init__(self, device: DeviceInfo) -> None:
        self._index = device.index
        self._backend = None if device.kind in ("cpu", "mps") else _backend(device)
        self._stream = self._backend.Stream(device=device.index) if self._backend else None

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any = None) -> Any:
        """Copy once the mark `after` is reached; returns the mark of the end."""
        if self._backend is None or self._stream is None:
            target.copy_(source)
            return None
        with self._backend.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def mark(self) -> Any:
        """A mark after all work that is queued on the device's own stream so far."""
        return None if self._backend is None else self._backend.current_stream(self._index).record_event()

    def wait(self, mark: Any) -> None:
        """Let the work that is queued from now on begin when `mark` is reached."""
        if self._backend is not None and mark is not None:
            self._backend.current_stream(self._index).wait_event(mark)

    def wait_here(self, mark: Any) -> None:
        """Let the calling thread wait for `mark`."""
        if mark is not None:
            mark.synchronize()
