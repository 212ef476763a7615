"""Every mm_type on the libraries that can run here, against the float64 product of what its tensors stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.platform import DeviceInfo, list_devices
from lightx2v.quant.formats import quantize_leaves
from tests.numerics.definitions import input_values, weight_values

#: The mm_types of LightX2V's documentation (July 2025).
SEED = (
    "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm",
    "W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm",
    "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Q8F",
    "W-int8-channel-sym-A-int8-channel-sym-dynamic-Q8F",
    "W-fp8-block128-sym-A-fp8-channel-group128-sym-dynamic-Deepgemm",
    "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Sgl",
)
NAMES = (
    *SEED,
    *"fp8-pertensor mxfp8 mxfp6-mxfp8 mxfp4 nvfp4 nvfp4-split-n-workaround int4-g128".split(),
    *"gguf-BF16 gguf-Q8_0 gguf-Q5_1 gguf-Q5_0 gguf-Q4_1 gguf-Q4_0".split(),
    *(f"W-{spec}-sym-Auto" for spec in "int8-channel fp8-channel fp8-block128 fp8-tensor mxfp6-group32".split()),
    *("W-nvfp4-group16-sym-Auto", "W-fp8-tensor-sym-A-fp8-tensor-sym-dynamic-Auto"),
    *"int4-w4a4 nf4 nf4-double fp4 fp4-double int8-weight-only fp8-weight-only int8-g64 int8-g64-asym".split(),
    *"int8-channel-asym int4-g64-asym int4-channel int3-g64 int3-g128-asym int3-channel".split(),
    *"int2-g32 int2-g128-asym".split(),
)
SLABS = (
    "mxfp4 nvfp4 int4-g128 int3-g64-asym nf4-double int4-w4a4 gguf-Q8_0 fp8-pertensor W-fp8-block128-sym-Auto".split()
)
CASES = [
    (device, library, name)
    for device in list_devices()
    for library in ("torch_scaled", "dequantize", "reference", "angelslim")
    for name in NAMES
    if LIBRARIES[library].can_serve(parse(name).with_library(library), 128, 128, device) is None
]
IDS = [f"{device.torch_name}-{library}-{name}" for device, library, name in CASES]
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def test_every_name_has_a_library_here() -> None:
    assert {name for _, _, name in CASES} == set(NAMES)


def columns(scheme: Scheme, k: int) -> int:
    """K, a multiple of what cannot be filled up: the blocks of .gguf files."""
    assert scheme.weight is not None
    return k + -k % scheme.weight.size if scheme.weight.dtype.startswith("gguf") else k


def check(device: DeviceInfo, library: str, scheme: Scheme, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert scheme.weight is not None
    adapter, place = LIBRARIES[library], torch.device(device.torch_name)
    leaves = quantize_leaves(weight.to(place), scheme.weight)
    packed = adapter.prepare(scheme, leaves)
    assert packed.n == weight.shape[0] and packed.k >= weight.shape[1]
    codes = adapter.quantize(scheme, x.to(place), packed)
    got = adapter.gemm(scheme, codes, packed, None if bias is None else bias.to(place), x.dtype).cpu()
    xd = input_values(x, codes, scheme.activation)
    wd = weight_values(leaves, scheme.weight)[:, : x.shape[1]]
    exact, size = xd @ wd.T, xd.abs() @ wd.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    rtol = 2.0**-21 if scheme.weight.dtype in adapter.caps.exact and scheme.activation else adapter.caps.bound(scheme)
    if library == "dequantize" and scheme.activation and x.dtype == torch.float32:
        rtol = 2.0**-18  # codes are multiplied as float32
    info = torch.finfo(x.dtype)
    limit = size * rtol + exact.abs() * info.eps + info.tiny
    assert got.dtype == x.dtype and got.shape == exact.shape
    wrong = ~((got.double() - exact).abs() <= limit) & (exact.abs() + limit < info.max)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} results are off"
    for leaf, tensor in adapter.unpack(scheme, packed).items():
        assert tensor.dtype == leaves[leaf].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), leaves[leaf].flatten().view(torch.uint8)), leaf


@pytest.mark.parametrize(("device", "library", "name"), CASES, ids=IDS)
@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 160),
    k=st.integers(1, 320),
    magnitude=st.sampled_from([0.0, 6e-8, 1.0, 65504.0]),
    dtype=DTYPES,
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
    magnitude: float,
    dtype: torch.dtype,
    with_bias: bool,
    seed: int,
) -> None:
    scheme = parse(name).with_library(library)
    k = columns(scheme, k)
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.rand(m, k, generator=generator) * 2 - 1) * magnitude).to(dtype)
    weight = torch.randn(n, k, generator=generator)
    x[m // 2], weight[n // 2] = 0, 0
    bias = torch.randn(n, generator=generator) if with_bias else None
    check(device, library, scheme, x, weight, bias)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6-mxfp8", "mxfp4", "nvfp4", "fp8-pertensor", "int4-g128", "gguf-Q4_0"])
@pytest.mark.parametrize("m", [1, 255, 4097])
def test_many_rows(name: str, m: int) -> None:
    torch.manual_seed(m)
    x, weight = torch.randn(m, 384, dtype=torch.bfloat16), torch.randn(200, 384) / 20
    for device in list_devices():
        check(device, "dequantize", parse(name).with_library("dequantize"), x, weight, None)


@pytest.mark.parametrize(
    "name",
    "mxfp4 nvfp4 int4-g128 int3-g64-asym nf4-double int4-w4a4 gguf-Q8_0 fp8-pertensor W-fp8-block128-sym-Auto".split(),
)
def test_slabs_of_a_weight_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightx2v.mm import weight_only

    torch.manual_seed(0)
    scheme, adapter = parse(name).with_library("dequantize"), LIBRARIES["dequantize"]
    assert scheme.weight is not None
    packed = adapter.prepare(scheme, quantize_leaves(torch.randn(300, 256), scheme.weight))
    x = torch.randn(5, 256)
    whole = adapter.linear(scheme, x, packed, None)
    monkeypatch.setattr(weight_only, "SLAB_ELEMENTS", {"cpu": 256 * 7})
    assert torch.equal(adapter.linear(scheme, x, packed, None), whole)
    monkeypatch.setattr(weight_only, "PRODUCT_ELEMENTS", {"cpu": 256 * 50})
    torch.testing.assert_close(adapter.linear(scheme, x, packed, None), whole, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("library", ["dequantize", "reference"])
@pytest.mark.parametrize("fault", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp6-mxfp8", "mxfp4", "nvfp4", "fp8-pertensor", "int4-g128", "gguf-Q8_0"])
def test_what_is_not_finite_shows(name: str, fault: float, library: str) -> None:
    scheme, adapter = parse(name).with_library(library), LIBRARIES[library]
    assert scheme.weight is not None
    leaves = quantize_leaves(torch.randn(16, 256), scheme.weight)
    if name == "nvfp4":
        leaves["input_global_scale"] = torch.tensor(500.0)
    if name == "fp8-pertensor":
        leaves["input_scale"] = torch.tensor([0.01])
    packed = adapter.prepare(scheme, leaves)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    x[1, 5] = fault
    out = adapter.linear(scheme, x, packed, None)
    assert not out[1].isfinite().any() and out[0].isfinite().all() and out[2].isfinite().all()


@pytest.mark.parametrize("library", ["angelslim", "dequantize", "reference"])
@pytest.mark.parametrize("fault", [float("inf"), float("nan")])
def test_what_is_not_finite_shows_under_one_scale_for_all(fault: float, library: str) -> None:
    """No row is right beside it, and none may look as if it were."""
    scheme, adapter = parse("W-fp8-tensor-sym-A-fp8-tensor-sym-dynamic-Auto").with_library(library), LIBRARIES[library]
    assert scheme.weight is not None
    packed = adapter.prepare(scheme, quantize_leaves(torch.randn(16, 256), scheme.weight))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(3, 256, dtype=dtype)
        x[1, 5] = fault
        assert not adapter.linear(scheme, x, packed, None).isfinite().any()


@pytest.mark.parametrize("library", ["dequantize", "reference"])
def test_the_scale_of_the_input_is_the_checkpoints(library: str) -> None:
    """A static scale decides how inputs are rounded, whatever they are; without one each call has its own."""
    adapter, x = LIBRARIES[library], torch.tensor([[3.0, -1.3] * 16])
    fp8, fp4 = parse("fp8-pertensor").with_library(library), parse("nvfp4").with_library(library)
    assert fp8.weight is not None and fp4.weight is not None
    leaves = quantize_leaves(torch.randn(4, 32), fp8.weight)
    own = adapter.quantize(fp8, x, adapter.prepare(fp8, leaves))
    assert own.scale.item() == pytest.approx(3 / 448) and own.codes.float().abs().max() == 448
    static = adapter.quantize(fp8, x, adapter.prepare(fp8, {**leaves, "input_scale": torch.tensor([0.001])}))
    assert static.scale.item() == pytest.approx(0.001) and static.codes.float()[0, 0] == 448, "larger ones saturate"
    leaves = quantize_leaves(torch.randn(4, 32), fp4.weight)
    own = adapter.quantize(fp4, x, adapter.prepare(fp4, leaves))
    assert own.scale[0, -1].item() == pytest.approx(3 / 2688) and own.scale[0, 0] == 448
    packed = adapter.prepare(fp4, {**leaves, "input_global_scale": torch.tensor(2688 / 30)})
    static = adapter.quantize(fp4, x, packed)
    assert static.scale[0, -1].item() == pytest.approx(30 / 2688) and static.scale[0, 0] == 44  # 44.8 in e4m3
