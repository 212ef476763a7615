"""Weight-only products on a CPU by the compiled kernel: against float64, back to the tensors, and who takes over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightx2v.mm import onednn_weights
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import Scheme, parse
from lightx2v.mm.select import plan_layer
from lightx2v.native.build import Kernels, kernels
from lightx2v.platform import select_device
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.integers import levels_of, unpack_integers

CPU, ONEDNN = select_device("cpu"), LIBRARIES["onednn"]
needs_kernels = pytest.mark.skipif(not kernels().bfloat16, reason=str(kernels().reason or "no block products here"))
NAMES = (
    *("int8-weight-only", "fp8-weight-only", "int8-g64", "int8-channel-asym", "int8-g128-asym"),
    *("int4-g32", "int4-g128", "int4-g96-asym", "int4-channel-asym", "int4-channel"),
    *("int2-g128-asym", "int2-g32", "int2-channel-asym", "int4-g1024-asym"),
)


def scheme_of(name: str) -> Scheme:
    return parse(name).with_library("onednn")


def exact_weight(scheme: Scheme, leaves: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The weight [N, k] that the tensors mean, and the size of what is added up to it, both float64."""
    spec, scale = scheme.weight, leaves["weight_scale"].double()
    assert spec is not None
    if not spec.is_integer:
        values = leaves["weight"].double() * scale
        return values, values.abs()
    codes = unpack_integers(leaves["weight"], spec).double().unflatten(1, (scale.shape[1], -1))
    half = levels_of(spec) / 2
    zero = leaves["weight_zero"].double() if "weight_zero" in leaves else torch.full_like(scale, half)
    values = (codes - zero.unsqueeze(2)) * scale.unsqueeze(2)
    size = ((codes - half).abs() + (zero - half).abs().unsqueeze(2)) * scale.unsqueeze(2)
    return values.flatten(1)[:, :k], size.flatten(1)[:, :k]


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 160),
    k=st.integers(1, 1300),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    offset=st.sampled_from([0.0, 3.0]),
    with_bias=st.booleans(),
)
def test_product_equals_float64(
    name: str, m: int, n: int, k: int, dtype: torch.dtype, offset: float, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(m * n + k)
    weight = torch.randn(n, k, generator=generator) + offset
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator) if with_bias else None
    scheme = scheme_of(name)
    assert scheme.weight is not None
    leaves = quantize_leaves(weight, scheme.weight)
    got = ONEDNN.linear(scheme, x, ONEDNN.prepare(scheme, leaves), bias)
    values, sizes = exact_weight(scheme, leaves, k)
    added = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    exact = x.double() @ values.T + added
    limit = (x.double().abs() @ sizes.T + added.abs()) * ONEDNN.caps.rtol + exact.abs() * torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= limit + torch.finfo(dtype).tiny).all()


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_packing_gives_back_codes_scales_and_zero_points(name: str) -> None:
    torch.manual_seed(0)
    scheme = scheme_of(name)
    assert scheme.weight is not None
    for n, k in ((64, 128), (130, 1100), (7, 33)):
        leaves = quantize_leaves(torch.randn(n, k), scheme.weight)
        back = ONEDNN.unpack(scheme, ONEDNN.prepare(scheme, leaves))
        assert leaves.keys() == back.keys()
        for leaf, tensor in leaves.items():
            assert torch.equal(tensor.float(), back[leaf].float()) and tensor.dtype == back[leaf].dtype, leaf


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 65, 300, 1025])
@pytest.mark.parametrize("name", ["int8-weight-only", "fp8-weight-only", "int4-g128-asym", "int2-g64"])
def test_any_share_of_the_work_and_a_gelu(name: str, rows: int, threads: int) -> None:
    torch.manual_seed(rows)
    scheme, reference = scheme_of(name), LIBRARIES["reference"]
    assert scheme.weight is not None
    leaves = quantize_leaves(torch.randn(200, 392), scheme.weight)
    packed, plain, bias = ONEDNN.prepare(scheme, leaves), reference.prepare(scheme, leaves), torch.randn(200)
    x = torch.randn(rows, 784)[:, ::2]  # strided
    wanted = reference.linear(scheme, x, plain, bias)
    torch.testing.assert_close(ONEDNN.linear(scheme, x, packed, bias), wanted, rtol=1e-4, atol=1e-3)
    gelu = ONEDNN.linear(scheme, x, packed, bias, gelu=True)
    torch.testing.assert_close(gelu, F.gelu(wanted, approximate="tanh"), rtol=1e-3, atol=1e-3)


@needs_kernels
def test_packed_weights_take_their_bits() -> None:
    for name, share in (("int8-weight-only", 1.0), ("int4-g128", 0.5), ("int2-g128", 0.25)):
        scheme = scheme_of(name)
        assert scheme.weight is not None
        packed = ONEDNN.prepare(scheme, quantize_leaves(torch.randn(128, 256), scheme.weight))
        assert packed.weight.nbytes == share * 128 * 256 == ONEDNN.code_bytes(scheme, CPU) * 128 * 256


@needs_kernels
def test_groups_that_the_kernel_cannot_take_are_left_to_others() -> None:
    for name, library in (("int4-g16", "dequantize"), ("int4-g2048", "dequantize"), ("int4-g48", "dequantize")):
        plan = plan_layer("layer", name, parse(name), 8, 4096, device=CPU, fallback=False)
        assert plan.library == library
        assert "multiple of 32 up to 1024" in plan.reason
    assert plan_layer("layer", "int4-g32", parse("int4-g32"), 8, 64, device=CPU, fallback=False).library == "onednn"


def test_without_a_compiler_weights_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_weights, "kernels", lambda: Kernels(None, "no C++ compiler is installed"))
    plan = plan_layer("layer", "int4-g128", parse("int4-g128"), 8, 128, device=CPU, fallback=False)
    assert plan.library == "dequantize" and "no C++ compiler" in plan.reason
