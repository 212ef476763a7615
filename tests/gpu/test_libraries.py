"""Every kernel library that this machine's accelerator can run, on the shapes of a video. Skipped elsewhere.

python -m pytest -m gpu tests/gpu -rs
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lightx2v.mm.libraries import LIBRARIES, unavailable
from lightx2v.mm.scheme import known_names, parse
from lightx2v.platform import DeviceInfo, list_devices
from tests.gpu.checks import Case, check_library

pytestmark = pytest.mark.gpu
#: Every name of an 8-bit scheme that names a library with an adapter, long names for mixed quantizers included.
NAMES = sorted(
    {
        scheme.name
        for name in known_names()
        if (scheme := parse(name)).library in LIBRARIES
        and scheme.weight is not None
        and scheme.weight.dtype in ("int8", "fp8")
        and scheme.weight.granularity in ("channel", "block")
        and scheme.activation is not None
    }
)
#: [N, K] of a Wan2.1 1.3B block: attention, and the two layers of its feed-forward.
ATTENTION, UP, DOWN = (1536, 1536), (8960, 1536), (1536, 8960)
CASES = [
    *(
        Case(m, *ATTENTION, dtype, bias)
        for m in (1, 7, 33, 4096, 32760)
        for dtype in (torch.bfloat16, torch.float16)
        for bias in (False, True)
    ),
    *(Case(m, *shape, torch.bfloat16, True) for m in (33, 4096) for shape in (UP, DOWN)),
]


@cache
def accelerator() -> DeviceInfo:
    device = list_devices()[0]
    if device.kind == "cpu":
        pytest.skip("there is no accelerator")
    return device


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_scales_and_products(name: str, case: Case) -> None:
    scheme, device = parse(name), accelerator()
    reason = unavailable(scheme.library, scheme, case.n, case.k, device)
    if reason is not None:
        pytest.skip(f"{scheme.library}: {reason}")
    check_library(LIBRARIES[scheme.library], scheme, case, torch.device(device.torch_name))
