"""The library `triton`: what `tests.gpu.checks` asks of every library, over ragged sizes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lightx2v.kernels import gemm, ops, tiles
from lightx2v.kernels.tiles import Tile
from lightx2v.mm.libraries import LIBRARIES, unavailable
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.scheme import parse
from lightx2v.platform import DeviceInfo
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.spec import FP8_CHANNEL
from tests.gpu.checks import Case, check_library

NAMES = ["int8-triton", "fp8-triton", "fp8-b128-triton"]
SIZES = [(1, 16, 16), (7, 33, 48), (70, 96, 160), (130, 130, 304)]
CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_codes_scales_and_products(name: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    for bias in (False, True):
        check_library(LIBRARIES["triton"], parse(name), Case(m, n, k, dtype, bias), device)


@pytest.mark.parametrize(
    "tile",
    [
        Tile(32, 32, 32, 1, 4, group=1),
        Tile(64, 32, 64, 1, 4, group=3, descriptors=False),
        Tile(32, 64, 128, 1, 4, halves=True),
        Tile(32, 64, 32, 1, 4, group=2, halves=True, descriptors=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_every_way_to_cut_a_product_up_gives_the_same(name: str, tile: Tile, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    m, n, k = 70, 80, 112
    x = torch.randn(m, k, generator=generator)
    leaves = quantize_leaves(torch.randn(n, k, generator=generator), parse(name).weight)
    codes, scale = ops.quantize_tokens(x.to(device), name)
    weight, by_column = leaves["weight"].to(device), leaves["weight_scale"].to(device)
    bias = torch.randn(n, generator=generator).to(device)
    got = gemm.multiply_rows(codes, weight, scale, by_column, bias, torch.float32, tile).double().cpu()
    wanted = (codes.cpu().double() * scale.cpu().double()) @ (weight.cpu().double() * by_column.cpu().double()).t()
    wanted += bias.cpu().double()
    assert float((got - wanted).abs().max()) <= (1e-5 if device.type == "cpu" else 0.05) * float(wanted.abs().max())


def test_narrow_tiles_of_blocks(device: torch.device) -> None:
    """A tile that is a part of a block reads the block's scale."""
    generator = torch.Generator().manual_seed(4)
    m, n, k = 40, 200, 256
    leaves = quantize_leaves(torch.randn(n, k, generator=generator), parse("fp8-b128").weight)
    codes, scale = ops.quantize_groups(torch.randn(m, k, generator=generator).to(device), "fp8")
    weight, blocks = leaves["weight"].to(device), leaves["weight_scale"].to(device)
    results = [
        gemm.multiply_blocks(codes, weight, of_groups, blocks, None, torch.float32, Tile(32, width, 128, 1, 4)).cpu()
        for width in (32, 128)
        for of_groups in (scale, scale.contiguous())
    ]
    values = codes.cpu().double() * scale.cpu().double().repeat_interleave(128, 1)
    of_weight = leaves["weight_scale"].double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    wanted = values @ (leaves["weight"].double() * of_weight).t()
    for result in results:
        assert float((result.double() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_layer_gives_back_the_leaves_it_was_given(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    for name in NAMES:
        scheme = parse(name)
        layer = QuantLinear(144, 80, True, scheme, "triton", torch.bfloat16, weight_auto_quant=True)
        layer.load_tensor("weight", torch.randn(80, 144, generator=generator).to(device))
        layer.load_tensor("bias", torch.randn(80, generator=generator).to(device))
        layer.finish()
        leaves = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        again = QuantLinear(144, 80, True, scheme, "triton", torch.bfloat16)
        for leaf, tensor in leaves.items():
            again.load_tensor(leaf, tensor)
        again.finish()
        x = torch.randn(3, 5, 144, generator=generator).bfloat16().to(device)
        assert torch.equal(layer(x), again(x)) and leaves["weight"].shape == (80, 144)


def test_a_fake_run_gives_the_shapes_of_a_real_one() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(6, 200)
    with FakeTensorMode():
        fake = torch.empty(6, 200)
        weight = torch.empty(40, 200, dtype=torch.int8)
        tokens = torch.ops.lightx2v.triton_quantize_tokens(fake, "int8")
        groups = torch.ops.lightx2v.triton_quantize_groups(fake, "fp8")
        out = torch.ops.lightx2v.triton_multiply_rows(
            tokens[0], weight, tokens[1], torch.empty(40, 1), None, torch.bfloat16
        )
    assert out.shape == (6, 40) and out.dtype == torch.bfloat16
    for made, real in ((tokens, ops.quantize_tokens(x, "int8")), (groups, ops.quantize_groups(x, "fp8"))):
        for one, other in zip(made, real, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_the_fastest_tile_is_measured_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, device: torch.device
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "_chosen", {})
    slow, broken, fast = Tile(16, 16, 16, 1, 1), Tile(32, 16, 16, 1, 1), Tile(64, 16, 16, 1, 1)
    ran, clock = list[Tile](), [0.0]
    monkeypatch.setattr(tiles, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))

    def run(tile: Tile) -> None:
        ran.append(tile)
        if tile is broken:
            raise RuntimeError("out of shared memory")
        clock.append(clock[-1] + (2.0 if tile is slow else 1.0))

    assert tiles.fastest("key", (slow, broken, fast), run, device) is fast
    assert ran.count(broken) == 1 and ran.count(slow) > 1
    ran.clear()
    assert tiles.fastest("key", (slow, broken, fast), run, device) is fast
    monkeypatch.setattr(tiles, "_chosen", {})  # as another process finds it
    assert tiles.fastest("key", (slow, broken, fast), run, device) is fast and not ran
    assert tiles.fastest("key", (slow, dataclasses.replace(fast, group=4)), run, device).group == 4 and ran


def test_what_it_needs_is_said() -> None:
    turing = DeviceInfo("cuda", 0, "a T4", (7, 5), 1, 1)
    ampere = DeviceInfo("cuda", 0, "an A100", (8, 0), 1, 1)
    for scheme in map(parse, NAMES):
        assert "needs compute capability 8.0 or higher, a CPU has none" in str(
            unavailable("triton", scheme, 64, 64, CPU)
        )
        assert "a T4 has 7.5" in str(unavailable("triton", scheme, 64, 64, turing))
    assert "needs compute capability 8.9 or higher" in str(unavailable("triton", parse("fp8"), 64, 64, ampere))
    assert unavailable("triton", parse("nf4"), 64, 64, ampere) == "does not compute this scheme"


def test_other_libraries_take_its_codes(device: torch.device) -> None:
    """`-ActTriton`: on a CPU torch quantizes, with the same codes."""
    scheme = parse("W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Reference-ActTriton")
    leaves = quantize_leaves(torch.randn(32, 48), FP8_CHANNEL)
    library = LIBRARIES["reference"]
    x = torch.randn(4, 48).bfloat16()
    got = library.quantize(scheme, x, library.prepare(scheme, leaves))
    codes, scale = (tensor.cpu() for tensor in ops.quantize_tokens(x.to(device), "fp8"))
    assert torch.equal(got.codes.float(), codes.float()) and torch.equal(got.scale, scale)
