"""Products of quantized codes: the reference against float64, and every library that can run here against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.mm.base import Library
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.reference import int_product
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.mm.torch_fp8 import _to_bfloat16
from lightx2v.platform import DeviceInfo, list_devices
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.numerics import Quantized, dequantize_weight, quantize_weight

SCHEMES = ("int8", "fp8", "fp8-b128")
CASES = [
    (device, library, name)
    for device in list_devices()
    for library in LIBRARIES
    for name in SCHEMES
    if LIBRARIES[library].available(device) is None
    and LIBRARIES[library].can_serve(parse(name).with_library(library), 127, 125, device) is None  # serves any shape
]
IDS = [f"{device.torch_name}-{library}-{name}" for device, library, name in CASES]
MAGNITUDES = {"zeros": 0.0, "tiny": 6e-8, "normal": 1.0, "largest fp16": 65504.0}


def dequantize(x: Quantized, scheme: Scheme) -> Tensor:
    assert scheme.activation is not None
    columns = x.codes.shape[1]
    return x.codes.double() * x.scale.double().repeat_interleave(scheme.activation.size or columns, dim=1)[:, :columns]


def check(
    device: DeviceInfo,
    library: Library,
    scheme: Scheme,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: torch.dtype,
) -> None:
    """y must be the float64 product of the same codes: exactly rounded for int8, within caps.rtol for fp8."""
    assert scheme.weight is not None
    place = torch.device(device.torch_name)
    w = quantize_weight(weight.to(place), scheme.weight)
    packed = library.prepare(scheme, {"weight": w.codes, "weight_scale": w.scale})
    codes = library.quantize(scheme, x.to(place), packed)
    got = library.gemm(scheme, codes, packed, None if bias is None else bias.to(place), out).cpu()

    xd, wd = (
        dequantize(codes, scheme).cpu()[:, : x.shape[1]],
        dequantize_weight(w.codes, w.scale, scheme.weight).cpu().double(),
    )
    exact = xd @ wd.T + (0 if bias is None else bias.double())
    size = xd.abs() @ wd.abs().T + (0 if bias is None else bias.double().abs())
    # float32 scales and bias round a few times even when the accumulation is exact.
    rtol = 2.0**-21 if scheme.weight.dtype in library.caps.exact else library.caps.rtol
    info = torch.finfo(out)
    limit = size * rtol + exact.abs() * info.eps + info.tiny
    assert got.dtype == out and got.shape == exact.shape
    # Near the largest number of `out`, a permitted error may round to infinity.
    wrong = ~((got.double() - exact).abs() <= limit) & (exact.abs() + limit < info.max)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} results are off"


@pytest.mark.parametrize(("device", "library", "name"), CASES, ids=IDS)
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 160),
    k=st.integers(1, 320),
    magnitude=st.sampled_from(sorted(MAGNITUDES)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_product(
    device: DeviceInfo,
    library: str,
    name: str,
    m: int,
    n: int,
    k: int,
    magnitude: str,
    dtype: torch.dtype,
    with_bias: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.rand(m, k, generator=generator) * 2 - 1) * MAGNITUDES[magnitude]).to(dtype)
    x[m // 2] = 0
    weight = torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator) if with_bias else None
    check(device, LIBRARIES[library], parse(name).with_library(library), x, weight, bias, dtype)


@pytest.mark.parametrize(("device", "library", "name"), CASES, ids=IDS)
def test_libraries_equal_the_reference(device: DeviceInfo, library: str, name: str) -> None:
    """int8 to the last bit after the same rounding; fp8 in the mean as near as bfloat16 is."""
    torch.manual_seed(0)
    scheme, adapter, reference = parse(name).with_library(library), LIBRARIES[library], LIBRARIES["reference"]
    assert scheme.weight is not None
    leaves = quantize_leaves(torch.randn(200, 392).to(device.torch_name), scheme.weight)
    packed = adapter.prepare(scheme, leaves)
    x = adapter.quantize(scheme, torch.randn(70, 392).to(device.torch_name), packed)
    bias = torch.randn(200).to(device.torch_name)
    for out in (torch.bfloat16, torch.float32):
        got = adapter.gemm(scheme, x, packed, bias, out)
        wanted = reference.gemm(scheme, x, reference.prepare(scheme, leaves), bias, out)
        if scheme.weight.dtype == "int8":
            assert torch.equal(got, wanted)
        else:
            assert (got - wanted).float().norm() <= 0.005 * wanted.float().norm()
    unpacked = adapter.unpack(scheme, packed)
    assert unpacked.keys() == leaves.keys()
    assert all(torch.equal(unpacked[leaf].float(), leaves[leaf].float()) for leaf in leaves)


@pytest.mark.parametrize(("device", "library", "name"), [case for case in CASES if case[2] == "int8"])
def test_sums_beyond_what_float32_holds_are_exact(device: DeviceInfo, library: str, name: str) -> None:
    scheme, adapter = parse(name).with_library(library), LIBRARIES[library]
    codes = torch.full((20, 20_001), 127, dtype=torch.int8, device=device.torch_name)
    codes[:, -1] = 1
    ones = torch.ones(20, 1, device=device.torch_name)
    exact = 127 * 127 * 20_000 + 1  # not a float32: it needs 29 bits
    assert (int_product(codes, codes) == exact).all()
    packed = adapter.prepare(scheme, {"weight": codes, "weight_scale": ones})
    out = adapter.gemm(scheme, Quantized(codes, ones), packed, None, torch.float32)
    assert (out == torch.tensor(exact).float().item()).all()


def test_every_finite_e4m3_code_becomes_bfloat16_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = ~codes.float().isnan()
    assert torch.equal(_to_bfloat16(codes)[finite], codes.to(torch.bfloat16)[finite])


def test_a_long_row_needs_more_than_int32() -> None:
    codes = torch.full((1, 2**17 + 1), -128, dtype=torch.int8)
    assert int_product(codes, codes).item() == 2**14 * (2**17 + 1)
