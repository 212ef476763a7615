"""torchao itself, where it is installed: its int8 runs on CPUs and must equal the reference to the last bit."""

from __future__ import annotations

import pytest
import torch

from lightx2v.mm.libraries import LIBRARIES, unavailable
from lightx2v.mm.reference import LIBRARY as REFERENCE
from lightx2v.mm.scheme import parse
from lightx2v.platform import DeviceInfo, probe, select_device
from lightx2v.quant.formats import quantize_leaves

pytestmark = pytest.mark.skipif(probe("torchao").version is None, reason=f"torchao is {probe('torchao').reason}")
SCHEME = parse("int8-torchao")


@pytest.fixture(scope="module")
def cpu() -> DeviceInfo:
    return select_device("cpu")


def test_a_cpu_is_served(cpu: DeviceInfo) -> None:
    assert unavailable("torchao", SCHEME, 256, 384, cpu) is None
    assert unavailable("torchao", parse("fp8-torchao"), 256, 384, cpu) is not None


@pytest.mark.parametrize("rows", [1, 7, 33, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (256, 384), (1536, 1536)], ids=str)
def test_codes_scales_and_products_are_the_references(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    library = LIBRARIES["torchao"]
    assert SCHEME.weight is not None
    leaves = quantize_leaves(torch.randn(shape, generator=generator), SCHEME.weight)
    packed, exact = library.prepare(SCHEME, leaves), REFERENCE.prepare(SCHEME, leaves)
    # Rows from far below its smallest scale up to large ones, and a zero row.
    x = (torch.randn(rows, shape[1], generator=generator) * torch.logspace(-7, 2, rows).unsqueeze(1)).to(dtype)
    x[rows // 2] = 0
    got, wanted = library.quantize(SCHEME, x, packed), REFERENCE.quantize(SCHEME, x, exact)
    assert torch.equal(got.codes, wanted.codes) and torch.equal(got.scale, wanted.scale)
    for bias in (None, torch.randn(shape[0], generator=generator)):
        assert torch.equal(library.linear(SCHEME, x, packed, bias), REFERENCE.linear(SCHEME, x, exact, bias))
    unpacked = library.unpack(SCHEME, packed)
    assert all(torch.equal(unpacked[leaf], leaves[leaf]) for leaf in leaves)
