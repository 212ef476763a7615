"""Every attention backend that this machine's accelerator can run, against `torch_sdpa`. Skipped elsewhere.

python -m pytest -m gpu tests/gpu/test_attention.py -rs
"""

from __future__ import annotations

import pytest
import torch

from lightx2v.attention.base import ATTENTION, Needs, unavailable
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.platform import list_devices

pytestmark = pytest.mark.gpu
#: Largest error as a share of the result's length, for normal q, k and v: half-precision rounding, 8 bits, 4 bits. What
#: leaves blocks out does not come near the definition on such data, and is only held to be finite.
EXACT, EIGHT_BITS, FOUR_BITS = 0.01, 0.1, 0.35
SPARSE = ("radial_attn", "sparge_attn", "spas_sage_attn2")
GRID = (6, 16, 14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1344, 1344), (1344, 512), (1344, 257), (4608, 4608)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ATTENTION)
def test_against_torch(name: str, dim: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    device = list_devices()[0]
    if device.kind == "cpu":
        pytest.skip("there is no accelerator")
    part = "self" if queries == keys else "cross"
    reason = unavailable(name, device, str(dtype).removeprefix("torch."), Needs(dim, queries, part=part))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 3, dim, generator=generator).to(device.torch_name, dtype) for n in (queries, keys, keys)
    )
    backend = ATTENTION[name]
    fn = backend.fn if backend.for_grid is None else backend.for_grid(GRID)
    before = k.clone()
    for scale in (None, 0.05):
        got, wanted = fn(q, k, v, scale=scale).double(), torch_sdpa(q.double(), k.double(), v.double(), scale=scale)
        assert got.shape == q.shape and bool(got.isfinite().all())
        bound = EXACT if backend.exact else FOUR_BITS if name == "sage_attn3" else EIGHT_BITS
        assert name in SPARSE or float((got - wanted).norm() / wanted.norm()) <= bound
    assert torch.equal(k, before)
    if name in SPARSE:
        return
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool, device=k.device)
    mask[1, ..., keys // 2 :] = False
    got, wanted = fn(q, k, v, mask=mask).double(), torch_sdpa(q.double(), k.double(), v.double(), mask=mask)
    assert float((got - wanted).norm() / wanted.norm()) <= bound
