"""The compiled CPU kernels: against float64, against torch's definitions, and what happens without a compiler."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightx2v import elementwise
from lightx2v.mm import onednn
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.models.wan.dit import rope_table
from lightx2v.native import build, ops
from lightx2v.native.build import Kernels, kernels
from lightx2v.platform import select_device
from lightx2v.quant.formats import quantize_leaves

CPU = select_device("cpu")
needs_kernels = pytest.mark.skipif(not kernels().bfloat16, reason=str(kernels().reason or "no block products here"))
NONE = Kernels(None, "no C++ compiler is installed")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "kernels", lambda: NONE)
    monkeypatch.setattr(onednn, "kernels", lambda: NONE)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_compiles_where_there_is_a_compiler() -> None:
    if shutil.which("g++"):
        assert kernels().library is not None and kernels().reason is None


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 65, 300, 1025])
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-b128"])
def test_linear_equals_the_reference_for_any_share_of_the_work(name: str, rows: int, threads: int) -> None:
    torch.manual_seed(rows)
    scheme, reference = parse(name).with_library("onednn"), LIBRARIES["reference"]
    assert scheme.weight is not None
    leaves = quantize_leaves(torch.randn(200, 392), scheme.weight)
    bias = torch.randn(200)
    packed, plain = LIBRARIES["onednn"].prepare(scheme, leaves), reference.prepare(scheme, leaves)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(rows, 392).to(dtype)
        got = LIBRARIES["onednn"].linear(scheme, x, packed, bias)
        wanted = reference.linear(scheme, x, plain, bias)
        assert got.dtype == dtype
        if name == "int8":
            assert torch.equal(got, wanted)
        else:
            assert (got - wanted).float().norm() <= 2e-4 * wanted.float().norm()
        gelu = LIBRARIES["onednn"].linear(scheme, x, packed, bias, gelu=True)
        torch.testing.assert_close(gelu, F.gelu(wanted, approximate="tanh"), rtol=0.02, atol=0.02)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(2, 3) * scale).softmax(-1) @ v).transpose(1, 2)


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 300),
    keys=st.integers(1, 600),
    heads=st.integers(1, 3),
    dim=st.sampled_from([8, 34, 40, 64, 128]),
    seed=st.integers(0, 99),
)
def test_attention_is_that_of_float64(batch: int, queries: int, keys: int, heads: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Slices of one product, as fused projections give them: rows are not dense.
    whole = torch.randn(batch, max(queries, keys), 3 * heads * dim, generator=generator).bfloat16() * 2
    q, k, v = (part.unflatten(-1, (heads, dim)) for part in whole.chunk(3, dim=-1))
    q, k, v = q[:, :queries], k[:, :keys], v[:, :keys]
    wanted = exact_attention(q, k, v, 0.3)
    got = ops.attention(q, k, v, 0.3)
    assert got.shape == q.shape and got.is_contiguous()
    assert (got.double() - wanted).norm() <= 0.004 * wanted.norm()


@needs_kernels
def test_attention_survives_large_scores(threads: int) -> None:
    q, k, v = (torch.randn(1, 70, 2, 32).bfloat16() * size for size in (300, 300, 1))
    got = ops.attention(q, k, v, 1.0)
    assert got.isfinite().all()
    assert (got.double() - exact_attention(q, k, v, 1.0)).norm() <= 0.01 * got.double().norm()


def both(monkeypatch: pytest.MonkeyPatch, function: object, *args: object) -> tuple[Tensor, Tensor]:
    """The result with the compiled kernels, and of the definition in torch."""
    assert callable(function)
    native = function(*args)
    with monkeypatch.context() as patch:
        patch.setattr(build, "kernels", lambda: NONE)
        return native, function(*args)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_elementwise_passes_are_their_definitions(
    batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(batch)
    x, y = torch.randn(batch, 30, 96) * 3 + 1, torch.randn(batch, 30, 96).to(dtype)
    shift, scale, gate = torch.randn(batch, 6, 96).chunk(6, dim=1)[:3]
    weight, bias, rope = torch.randn(96), torch.randn(96), rope_table(32, (2, 3, 5))
    wide = torch.randn(batch, 30, 288).to(dtype)[..., 96:192]
    calls: list[tuple[object, ...]] = [
        (elementwise.layer_norm, x, weight, bias, 1e-6, dtype),
        (elementwise.modulated_norm, x, shift, scale, 1e-6, dtype),
        (elementwise.norm_rope, wide, weight, 1e-6, 3, rope),
        (elementwise.norm_rope, wide, weight, 1e-6, 3, None),
        (elementwise.norm_rope, wide, weight[:32], 1e-6, 3, rope),
        (elementwise.norm_rope, wide, None, 1e-6, 3, rope),
        (elementwise.add_gated, x, y, gate),
        (elementwise.add_gated, x, y),
        (elementwise.gelu_tanh, y * 4),
    ]
    for function, *args in calls:
        native, plain = both(monkeypatch, function, *args)
        assert native.dtype == plain.dtype and native.shape == plain.shape
        tolerance = 1e-5 if native.dtype == torch.float32 else 0.008
        torch.testing.assert_close(native, plain, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_gelu_of_extremes() -> None:
    x = torch.tensor([-torch.inf, -1e30, -50.0, -0.0, 0.0, 50.0, 1e30, torch.inf, torch.nan])
    got = ops.gelu_tanh(x)
    assert torch.equal(got[3:8], torch.tensor([0.0, 0.0, 50.0, 1e30, torch.inf]))
    assert got[1:3].abs().max() < 1e-6 and got[8].isnan()


@needs_kernels
def test_operators_are_what_torch_compile_expects() -> None:
    q, k, v = (torch.randn(1, 20, 2, 32).bfloat16() for _ in range(3))
    torch.library.opcheck(torch.ops.lightx2v.cpu_attention.default, (q, k, v, 0.2))
    torch.library.opcheck(torch.ops.lightx2v.cpu_gelu_tanh.default, (q,))
    torch.library.opcheck(torch.ops.lightx2v.cpu_add_gated.default, (torch.randn(1, 4, 8), torch.randn(1, 4, 8), None))
    layer = torch.compile(lambda x: ops.gelu_tanh(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(q), ops.gelu_tanh(q) + 1)


def test_without_a_compiler_every_scheme_still_has_a_library(no_compiler: None) -> None:
    x, weight = torch.randn(9, 256), torch.randn(128, 256)
    for name, library in (("int8", "onednn"), ("fp8", "torch_native"), ("fp8-b128", "torch_native")):
        plan = plan_layer("blocks.0.ffn.0", name, parse(name), 128, 256, device=CPU, fallback=False)
        assert plan.library == library and "no C++ compiler" in plan.reason
        assert plan.scheme.weight is not None
        packed = LIBRARIES[library].prepare(plan.scheme, quantize_leaves(weight, plan.scheme.weight))
        got = LIBRARIES[library].linear(plan.scheme, x, packed, None)
        assert (got - x @ weight.t()).norm() <= 0.06 * (x @ weight.t()).norm()


def test_a_compiler_that_fails_is_a_reason_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = build._find()
    assert found.library is None and found.reason is not None and "out of luck" in found.reason
    assert not list((tmp_path / "lightx2v").iterdir())


def test_the_cache_is_used_and_depends_on_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Path] = []

    def note(compiler: str, sources: list[Path], target: Path) -> None:
        compiled.append(target)
        target.write_bytes(b"not a library")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_compile", note)
    if kernels().library is None:
        pytest.skip(str(kernels().reason))
    first, second = build._built(), build._built()
    copy = shutil.copytree(build.SOURCES, tmp_path / "src")
    (copy / "common.h").write_text((copy / "common.h").read_text() + "\n")
    monkeypatch.setattr(build, "SOURCES", copy)
    assert first == second != build._built() and len(compiled) == 2
    assert "invalid" in str(build._find().reason) or build._find().library is None


def test_doctor_says_why_there_are_no_kernels(no_compiler: None) -> None:
    from lightx2v.doctor import examine, render

    entry = examine()["kernels"]["cpu kernels"]
    assert (entry["version"], entry["reason"]) == (None, NONE.reason) and "install g++" in entry["install"]
    assert "no C++ compiler" in render(examine())
