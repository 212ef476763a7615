"""Norms, rotary embedding, gates and GELU by kernels: against float64, and their codes against the two steps apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightx2v.elementwise import rotate
from lightx2v.kernels import ops
from lightx2v.quant.numerics import quantize_activation
from lightx2v.quant.spec import FP8_TOKEN, INT8_TOKEN

HALVES = [torch.float32, torch.bfloat16, torch.float16]
SPECS = {"int8": INT8_TOKEN, "fp8": FP8_TOKEN}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    eps = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), wanted.double(), rtol=eps, atol=2 * eps)


def same_codes(got: tuple[Tensor, Tensor], plain: Tensor, kind: str) -> None:
    """The codes of a fused kernel are those of what the plain kernel gives."""
    wanted = quantize_activation(plain.cpu().flatten(0, -2), SPECS[kind])
    assert torch.equal(got[0].cpu().float(), wanted.codes.float()) and torch.equal(got[1].cpu(), wanted.scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("batch", "width", "tables"), [(1, 20, 1), (2, 96, 2), (2, 200, 1)])
def test_layer_norm(batch: int, width: int, tables: int, dtype: torch.dtype, device: torch.device) -> None:
    x = normal(batch, 3, width) * 5 + 2
    factor, offset = 1 + normal(tables, 1, width, seed=1), normal(tables, 1, width, seed=2)
    placed = [tensor.to(device) for tensor in (x, factor, offset)]
    got = ops.layer_norm(*placed, 1e-6, dtype)
    wanted = F.layer_norm(x.double(), (width,), eps=1e-6) * factor.double() + offset.double()
    assert got.dtype == dtype and got.shape == x.shape
    near(got, wanted, dtype)
    for kind in SPECS:
        same_codes(ops.layer_norm_codes(*placed, None, 1e-6, dtype, kind), got, kind)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("gates", [0, 1, 2])
def test_a_sum_and_its_norm_in_one_pass(gates: int, dtype: torch.dtype, device: torch.device) -> None:
    width = 72
    x, y = normal(2, 3, width) * 5 + 2, normal(2, 3, width, seed=1).to(dtype)
    gate = normal(gates, 1, width, seed=2).to(device) if gates else None
    x, y, factor, offset, by = (
        tensor.to(device)
        for tensor in (x, y, 1 + normal(1, 1, width, seed=3), normal(1, 1, width, seed=4), 0.5 + normal(width, seed=5))
    )
    total = ops.add_gated(x, y, gate)
    apart = ops.layer_norm(total, factor, offset, 1e-6, dtype)
    got = ops.sum_norm(x, y, gate, factor, offset, 1e-6, dtype)
    assert torch.equal(got[0], total) and torch.equal(got[1], apart)
    for kind in SPECS:
        for multiplier in (None, by):
            wanted = apart if multiplier is None else (apart * multiplier).to(dtype)
            summed, *codes = ops.sum_norm_codes(x, y, gate, factor, offset, multiplier, 1e-6, dtype, kind)
            assert torch.equal(summed, total)
            same_codes((codes[0], codes[1]), wanted, kind)
            same_codes(ops.layer_norm_codes(total, factor, offset, multiplier, 1e-6, dtype, kind), wanted, kind)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu(dtype: torch.dtype, device: torch.device) -> None:
    x = (normal(5, 130) * 4).to(dtype)
    x[0, :3] = torch.tensor([0.0, -60.0, 60.0])
    got = ops.gelu_tanh(x.to(device))
    near(got, F.gelu(x.double(), approximate="tanh"), dtype)
    for kind in SPECS:
        same_codes(ops.gelu_codes(x.to(device), None, kind), got, kind)
        by = 0.5 + normal(130, seed=1).to(device)
        same_codes(ops.gelu_codes(x.to(device), by, kind), (got * by).to(dtype), kind)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu_beside_something_else(dtype: torch.dtype, device: torch.device) -> None:
    wide = normal(5, 200).to(dtype).to(device)
    x, y, by = normal(5, 30, seed=1).to(dtype).to(device), wide[:, 70:], 0.5 + normal(160, seed=2).to(device)
    apart = torch.cat([x, ops.gelu_tanh(y)], dim=1)
    for kind in SPECS:
        same_codes(ops.joined_gelu_codes(x, y, None, kind), apart, kind)
        same_codes(ops.joined_gelu_codes(x, y, by, kind), (apart * by).to(dtype), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gates", [0, 1, 2])
def test_add_gated(gates: int, dtype: torch.dtype, device: torch.device) -> None:
    x, y = normal(2, 3, 50), normal(2, 3, 50, seed=1).to(dtype)
    gate = normal(gates, 1, 50, seed=2) if gates else None
    got = ops.add_gated(x.to(device), y.to(device), None if gate is None else gate.to(device))
    wanted = x.double() + y.double() * (1 if gate is None else gate.double())
    near(got, wanted, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("of", ["width", "heads", "none"])
@pytest.mark.parametrize("turned", [True, False])
def test_rms_rope(turned: bool, of: str, dtype: torch.dtype, device: torch.device) -> None:
    batch, tokens, heads, dim = 2, 3, 5, 12
    wide = normal(batch, tokens, 2 * heads * dim).to(dtype)
    x = wide[..., : heads * dim]  # as a part of projections that were made together
    weight = {"width": normal(heads * dim, seed=1), "heads": normal(dim, seed=1), "none": None}[of]
    angle = normal(tokens, 1, dim // 2, seed=2)
    tables = (angle.cos(), angle.sin()) if turned else None
    flat = [None, None] if tables is None else [table.flatten(1).to(device) for table in tables]
    got = ops.rms_rope(x.to(device), None if weight is None else weight.to(device), *flat, heads, 1e-6)
    y = x.double()
    if weight is not None:
        y = F.rms_norm(y.unflatten(-1, (-1, len(weight))), (len(weight),), weight.double(), 1e-6).flatten(-2)
    y = y.unflatten(-1, (heads, dim))
    wanted = (y if tables is None else rotate(y, (tables[0].double(), tables[1].double()))).flatten(2)
    assert got.dtype == dtype and got.is_contiguous()
    near(got, wanted, dtype)
