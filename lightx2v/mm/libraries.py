"""Every library that an mm_type can name: the ones with an adapter here, and the others with the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

from lightx2v.mm.base import NOT_COMPUTED, Library, computes
from lightx2v.mm.scheme import Scheme
from lightx2v.platform import DeviceInfo, install_hint, probe
from lightx2v.registry import Registry

LIBRARIES: Registry[Library] = Registry("kernel library")
LIBRARIES.add("onednn", "lightx2v.mm.onednn:LIBRARY")
LIBRARIES.add("vllm", "lightx2v.mm.vllm:LIBRARY")
LIBRARIES.add("sgl", "lightx2v.mm.sgl:LIBRARY")
LIBRARIES.add("deepgemm", "lightx2v.mm.deepgemm:LIBRARY")
LIBRARIES.add("q8f", "lightx2v.mm.q8f:LIBRARY")
LIBRARIES.add("torchao", "lightx2v.mm.torchao:LIBRARY")
LIBRARIES.add("triton", "lightx2v.mm.triton:LIBRARY")
LIBRARIES.add("torch_native", "lightx2v.mm.torch_native:LIBRARY")
LIBRARIES.add("torch_scaled", "lightx2v.mm.torch_scaled:LIBRARY")
LIBRARIES.add("outliers", "lightx2v.mm.outliers:LIBRARY")
LIBRARIES.add("dequantize", "lightx2v.mm.weight_only:LIBRARY")
LIBRARIES.add("reference", "lightx2v.mm.reference:LIBRARY")
LIBRARIES.add("angelslim", "lightx2v.mm.angelslim:LIBRARY")

#: The order in which "auto", and a permitted fallback, look for a library. "angelslim" is used where it is named.
PRIORITY = tuple(
    "onednn vllm sgl deepgemm q8f torchao triton torch_native torch_scaled outliers dequantize reference".split(),
)


@dataclass(frozen=True, slots=True)
class _Absent:
    """A library without an adapter: the module it is in, whether pip can install that, and the device it needs."""

    module: str = ""
    pip: bool = True
    needs: str = ""


_ABSENT: dict[str, _Absent] = {
    "torchao_affine": _Absent(needs="another library to multiply: it is a rounding of inputs (-ActTorchaoAffine)"),
    "marlin": _Absent("marlin", pip=False),
    "lightx2v_kernel": _Absent("lightx2v_kernel", pip=False, needs="compute capability 12.0"),
    "npu": _Absent("torch_npu", needs="an Ascend NPU"),
    "tmo": _Absent("torch_mlu_ops", pip=False, needs="a Cambricon MLU"),
    "musa": _Absent("torch_musa", pip=False, needs="a Moore Threads GPU"),
    "iluvatar": _Absent("ixformer", pip=False, needs="an Iluvatar GPU"),
    "hygon_dcu": _Absent("vllm", pip=False, needs="a Hygon DCU"),
    "intel_xpu": _Absent(needs="an Intel GPU"),
}
#: Names that LightX2V keeps among its libraries and that are something else.
_NOT_LIBRARIES = {
    "calibration": "it records statistics for a calibration, which this version does not have",
    "tensor_parallel": "it splits layers over devices, which this version does not do",
}


def unavailable(library: str, scheme: Scheme, n: int, k: int, device: DeviceInfo) -> str | None:
    """Why `library` cannot compute `scheme` for a weight [n, k] on `device`; None when it can."""
    if library in LIBRARIES:
        adapter = LIBRARIES[library]
        if not computes(adapter.caps, scheme):
            return NOT_COMPUTED  # rather than how to install it
        return adapter.available(device) or adapter.can_serve(scheme, n, k, device)
    if library in _NOT_LIBRARIES:
        return _NOT_LIBRARIES[library]
    absent = _ABSENT[library]
    reasons = [f"needs {absent.needs}"] if absent.needs else []
    if absent.module:
        found = probe(absent.module)
        state = f"{found.version} is installed" if found.version else f"is {found.reason}"
        hint = f" ({install_hint(absent.module)})" if absent.pip and not found.version else ""
        reasons.append(f"{absent.module} {state}{hint}")
    return "; ".join([*reasons, "this version has no adapter for it yet"])


def servers(scheme: Scheme, n: int, k: int, device: DeviceInfo) -> dict[str, str | None]:
    """For each library with an adapter, in the order of PRIORITY: why it cannot compute `scheme`, or None."""
    return {library: unavailable(library, scheme, n, k, device) for library in PRIORITY}
