"""8-bit attention by kernels: codes bit for bit those of `attention.quantized`, results within rounding of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v.attention.base import ATTENTION, Needs, unavailable
from lightx2v.attention.quantized import rounded, smooth
from lightx2v.kernels import attention, ops
from lightx2v.kernels.attention_codes import KEYS, QUERIES, scores_codes, values_codes
from lightx2v.kernels.interpreter import mend
from lightx2v.kernels.tiles import Tile
from lightx2v.platform import DeviceInfo
from tests.numerics.attention_definition import exact

REFERENCES = {"triton_8bit": "sage_ref_int8_fp8", "triton_8bit_fp16": "sage_ref_int8_fp16"}
#: Of the result's length. P is rounded relative to another maximum where tiles differ: by half a step of e4m3 or
#: float16, at random for each weight.
NEAR = {"triton_8bit": 0.02, "triton_8bit_fp16": 0.001}
#: (batch, queries, keys, heads, width of a head)
SHAPES = [(1, 1, 1, 1, 64), (2, 130, 70, 2, 64), (1, 65, 200, 1, 128), (1, 128, 128, 1, 128), (1, 300, 64, 1, 64)]


@pytest.fixture(autouse=True)
def mended() -> None:
    mend()


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Normal q, k and v, with keys that are far from zero in some channels."""
    batch, queries, keys, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, dim, generator=generator) for n in (queries, keys, keys))
    k[..., ::16] += 30
    return q.to(dtype), k.to(dtype), v.to(dtype)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double().cpu() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_any_shape_is_near_its_reference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = tensors(shape, dtype)
    got = ATTENTION[name].fn(q.to(device), k.to(device), v.to(device))
    assert got.shape == q.shape and got.dtype == dtype and got.is_contiguous()
    wanted = ATTENTION[REFERENCES[name]].fn(q, k, v)
    assert distance(got, wanted) <= NEAR[name] + (0 if dtype == torch.float32 else 0.003)
    assert distance(got, exact(q, k, v)) <= 0.06


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("of", ["width", "heads", "none"])
@pytest.mark.parametrize("rotated", [True, False])
def test_norm_and_rotation_in_the_pass_of_the_codes(
    rotated: bool, of: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch, tokens, heads, dim = 2, 70, 2, 64
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(batch, tokens, 3 * heads * dim, generator=generator).to(dtype).to(device)
    q, k, v = qkv.chunk(3, dim=-1)  # views, as of projections that were made together
    k[..., ::16] += 30
    v = v.unflatten(2, (heads, dim))
    width = {"width": heads * dim, "heads": dim, "none": 0}[of]
    weights = [torch.randn(width, generator=generator).to(device) if width else None for _ in range(2)]
    angle = torch.randn(tokens, dim // 2, generator=generator).to(device)
    tables = (angle.cos(), angle.sin()) if rotated else (None, None)
    got = ops.attention_turned(q, k, v, *weights, *tables, 1e-6, 0.125, True)
    turned = [
        ops.rms_rope(x, w, *tables, heads, 1e-6).unflatten(2, (heads, dim))
        for x, w in zip((q, k), weights, strict=True)
    ]
    assert got.shape == v.shape and torch.equal(got, ops.attention(*turned, v, 0.125, True))


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(("block_m", "block_n"), [(128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("eight", [True, False])
def test_every_tile_gives_the_same(
    eight: bool, block_m: int, block_n: int, descriptors: bool, device: torch.device
) -> None:
    q, k, v = tensors((1, 140, 150, 1, 64))
    tile = Tile(block_m, block_n, 0, 1, 4, descriptors=descriptors)
    codes = attention.encode(q.to(device), k.to(device), v.to(device), eight)
    got = attention.attend(*codes, q.to(device), 150, 0.125, eight, tile)
    name = "triton_8bit" if eight else "triton_8bit_fp16"
    assert distance(got, ATTENTION[REFERENCES[name]].fn(q, k, v)) <= NEAR[name]


@pytest.mark.parametrize("scale", [0.001, 0.7])
@pytest.mark.parametrize("name", REFERENCES)
def test_flat_and_peaked_scores(name: str, scale: float, device: torch.device) -> None:
    q, k, v = tensors((1, 70, 130, 1, 64), seed=1)
    got = ATTENTION[name].fn(q.to(device), k.to(device), v.to(device), scale=scale)
    assert distance(got, ATTENTION[REFERENCES[name]].fn(q, k, v, scale=scale)) <= NEAR[name]


@pytest.mark.parametrize("name", REFERENCES)
def test_masks_of_keys(name: str, device: torch.device) -> None:
    q, k, v = tensors((2, 40, 90, 1, 64), seed=2)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    mask[0, ..., 77:], mask[1, ..., ::3] = False, False
    got = ATTENTION[name].fn(q.to(device), k.to(device), v.to(device), mask=mask.to(device))
    assert distance(got, ATTENTION[REFERENCES[name]].fn(q, k, v, mask=mask)) <= NEAR[name]
    assert distance(got, exact(q, k, v, mask=mask)) <= 0.06


@pytest.mark.parametrize("name", REFERENCES)
def test_zeros_stay_finite(name: str, device: torch.device) -> None:
    q, k, v = tensors((1, 20, 70, 1, 64))
    for parts in ((q * 0, k, v), (q, k * 0, v), (q, k, v * 0)):
        got = ATTENTION[name].fn(*(part.to(device) for part in parts)).cpu()
        assert bool(got.isfinite().all()) and float((got - ATTENTION[REFERENCES[name]].fn(*parts)).abs().max()) <= 0.02


def blocks_of(x: Tensor, size: int) -> Tensor:
    """[B, L, H, Dh] -> [B * H, blocks, size, Dh], filled up with zeros."""
    rows = torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % 128))
    return rows.flatten(0, 1).unflatten(1, (-1, size))


@pytest.mark.parametrize("size", [QUERIES, KEYS])
def test_codes_of_queries_and_keys_are_those_of_the_reference(size: int, device: torch.device) -> None:
    q, _, _ = tensors((2, 150, 1, 2, 64), torch.bfloat16)
    for x in (q, q[:, 3:], q.transpose(1, 2).contiguous().transpose(1, 2)):
        codes, scale = scores_codes(x.to(device), size, smooth=False)
        parts = blocks_of(x.float(), size)
        wanted, of_block = rounded(parts, torch.int8, parts.abs().amax(dim=(2, 3), keepdim=True))
        assert torch.equal(codes.cpu(), wanted.flatten(1, 2)) and torch.equal(scale.cpu(), of_block[:, :, 0, 0])


def test_smoothed_keys_are_off_by_the_rounding_of_their_mean(device: torch.device) -> None:
    _, k, _ = tensors((1, 1, 333, 2, 64))
    codes, scale = scores_codes(k.to(device), KEYS, smooth=True)
    parts = blocks_of(smooth(k), KEYS)
    wanted, of_block = rounded(parts, torch.int8, parts.abs().amax(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(scale.cpu(), of_block[:, :, 0, 0], rtol=1e-5, atol=0)
    off = (codes.cpu().int() - wanted.flatten(1, 2).int()).abs()
    assert int(off.max()) <= 1 and float(off.float().mean()) < 1e-3


def test_codes_of_values_are_those_of_the_reference(device: torch.device) -> None:
    _, _, v = tensors((2, 1, 150, 2, 64), torch.bfloat16)
    codes, scale = (tensor.cpu() for tensor in values_codes(v.to(device), eight=True))
    rows = v.float().transpose(1, 2).flatten(0, 1)
    wanted, per_channel = rounded(rows, torch.float8_e4m3fn, rows.abs().amax(dim=1, keepdim=True))
    assert torch.equal(scale, per_channel[:, 0])
    assert (
        torch.equal(codes[:, :, :150].float(), wanted.float().transpose(1, 2)) and not codes[:, :, 150:].float().any()
    )
    halves, _ = values_codes(v.to(device), eight=False)
    assert torch.equal(halves.cpu()[:, :150], rows.half()) and not halves[:, 150:].any()


def test_it_is_one_operator_of_torch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 10, 3, 64, dtype=torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
        out = torch.ops.lightx2v.triton_attention(q, q, q, 0.1, True)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert ops.attention.__name__ == "attention"


def test_devices_and_widths() -> None:
    ada, ampere = (DeviceInfo("cuda", 0, "a GPU", capability, 1, 1) for capability in ((8, 9), (8, 6)))
    assert unavailable("triton_8bit", ada, "bfloat16", Needs(128)) is None
    assert "8.9 or higher" in str(unavailable("triton_8bit", ampere, "bfloat16", Needs(128)))
    assert unavailable("triton_8bit_fp16", ampere, "bfloat16", Needs(64)) is None
    assert "width 64 or 128" in str(unavailable("triton_8bit_fp16", ampere, "bfloat16", Needs(96)))
