"""Codes and scales of the kernels: bit for bit those of `quant.numerics`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v.kernels import ops
from lightx2v.quant.numerics import Quantized, quantize_activation
from lightx2v.quant.spec import FP8_GROUP128, FP8_TOKEN, INT8_TOKEN, QSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPECS = {"int8": INT8_TOKEN, "fp8": FP8_TOKEN}


def tokens(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of all sizes, one of zeros and one of a single value."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** torch.linspace(-2, 3, rows)[:, None]  # float16 holds up to 65504
    x = torch.randn(rows, columns, generator=generator) * size
    x[rows // 2] = 0
    x[-1] = 3.0
    return x.to(dtype)


def check(got: tuple[Tensor, Tensor], x: Tensor, spec: QSpec) -> None:
    wanted = quantize_activation(x, spec)
    codes, scale = Quantized(*(tensor.cpu() for tensor in got))
    assert scale.shape == wanted.scale.shape and torch.equal(scale, wanted.scale)
    assert codes.dtype == wanted.codes.dtype
    assert torch.equal(codes[:, : x.shape[1]].float(), wanted.codes.float())
    assert not codes[:, x.shape[1] :].float().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 16, 100, 333, 1536, 5120])
@pytest.mark.parametrize("kind", SPECS)
def test_tokens(kind: str, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x = tokens(5, columns, dtype, seed=columns)
    check(ops.quantize_tokens(x.to(device), kind), x, SPECS[kind])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 128, 130, 500, 2048, 5120])
def test_groups(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x = tokens(5, columns, dtype, seed=columns)
    codes, scale = ops.quantize_groups(x.to(device), "fp8")
    assert codes.shape[1] % 128 == 0 and scale.stride(0) == 1 and scale.stride(1) % 4 == 0
    check((codes, scale), x, FP8_GROUP128)


@pytest.mark.parametrize("kind", SPECS)
def test_every_tie_goes_to_the_even_code(kind: str, device: torch.device) -> None:
    """Halves between two codes, beside a value that makes the scale 1."""
    most = 127.0 if kind == "int8" else 448.0
    if kind == "int8":
        halves = torch.arange(-126, 126) + 0.5
    else:
        grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        halves = (grid[:-1] + grid[1:]) / 2
    x = torch.cat([halves, torch.tensor([most])])[None]
    codes, scale = ops.quantize_tokens(x.to(device), kind)
    assert scale.item() == 1.0 and not bool(codes.cpu()[0, :-1].view(torch.uint8).bitwise_and(1).any())
    check((codes, scale), x, SPECS[kind])


@pytest.mark.parametrize("kind", SPECS)
def test_rows_may_lie_apart(kind: str, device: torch.device) -> None:
    wide = tokens(4, 96, torch.bfloat16)
    for x in (wide[:, 16:80], wide.t(), wide[::2]):
        check(ops.quantize_tokens(x.to(device), kind), x, SPECS[kind])
    check(ops.quantize_groups(wide[:, 16:80].to(device), "fp8"), wide[:, 16:80], FP8_GROUP128)


@pytest.mark.parametrize("fault", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kind", SPECS)
def test_a_fault_shows_in_the_scale_of_its_row_alone(kind: str, fault: float, device: torch.device) -> None:
    x = tokens(3, 40, torch.float32)
    x[0, 7] = fault
    codes, scale = (tensor.cpu() for tensor in ops.quantize_tokens(x.to(device), kind))
    assert not bool(scale[0].isfinite())
    wanted = quantize_activation(x[1:], SPECS[kind])
    assert torch.equal(scale[1:], wanted.scale) and torch.equal(codes[1:].float(), wanted.codes.float())


def test_the_smallest_rows_stay_finite(device: torch.device) -> None:
    x = torch.full((2, 8), 1e-41)
    x[1] = 2.0**-126
    for kind, spec in SPECS.items():
        check(ops.quantize_tokens(x.to(device), kind), x, spec)
