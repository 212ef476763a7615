"""`flash_attn2_hub`, `flash_attn3_hub`, `flash_attn4_hub`, `sage_attn2_hub`: kernels by the `kernels` package.

It downloads the build for this torch from kernels-community, an organization it trusts, and keeps it. Only where
attention.allow_download permits it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from torch import Tensor

from lightx2v.attention import flash2, flash3, flash4, sage
from lightx2v.attention.base import HALVES, Backend
from lightx2v.attention.kernel import Kernel, maskless
from lightx2v.errors import LightX2VError
from lightx2v.platform import DeviceInfo
from lightx2v.vendor import Function

GET = Function(("kernels:get_kernel",), ("repo_id",), ("version",))


@lru_cache(maxsize=8)
def fetch(repository: str, version: int, name: str) -> Callable[..., Any]:
    """The function `name` of a kernel; downloaded, unless it was before. Raises LightX2VError."""
    try:
        found: Callable[..., Any] = getattr(GET.find().value(repository, version=version), name)
        return found
    except Exception as error:  # it passes on what its HTTP client and the import of the kernel raise
        told = " ".join(str(error).split())[:300]
        raise LightX2VError(
            repository,
            f"the kernel could not be had: {type(error).__name__}: {told}",
            do="check the network, or name another attention.type",
        ) from error


def _missing(device: DeviceInfo) -> str | None:
    return GET.find().reason


def _backend(name: str, repository: str, version: int, function: str, like: Backend, **given: object) -> Backend:
    """The kernel at `repository`, called with `given` as the backend `like` calls its own package."""
    get = partial(fetch, f"kernels-community/{repository}", version, function)
    scale_name = "sm_scale" if function == "sageattn" else "softmax_scale"

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return flash3.output(get()(q, k, v, **given, **{scale_name: scale}))

    kernel: Kernel = attend
    return Backend(
        maskless(name)(kernel),
        like.needs,
        missing=_missing,
        dtypes=HALVES,
        head_dims=like.head_dims,
        exact=like.exact,
        repository=f"kernels-community/{repository}",
        load=get,
    )


FLASH2 = _backend("flash_attn2_hub", "flash-attn2", 1, "flash_attn_func", flash2.BACKEND, causal=False)
FLASH3 = _backend("flash_attn3_hub", "flash-attn3", 1, "flash_attn_func", flash3.BACKEND, causal=False)
FLASH4 = _backend("flash_attn4_hub", "flash-attn4", 0, "flash_attn_func", flash4.BACKEND, causal=False)
SAGE2 = _backend("sage_attn2_hub", "sage-attention", 1, "sageattn", sage.SAGE2, tensor_layout="NHD", is_causal=False)
