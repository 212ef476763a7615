"""What was solved, as the tensors of checkpoints; and rotations of what is solved for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.errors import LightX2VError
from lightx2v.mm.scheme import parse
from lightx2v.quant import hadamard
from lightx2v.quant.around import Around, fold_around
from lightx2v.quant.calibration.gptq import gptq
from lightx2v.quant.calibration.grids import IntegerGrid, dequantize, fake_quantize, nearest
from lightx2v.quant.calibration.hqq import hqq
from lightx2v.quant.calibration.rotation import fold_down, fold_gram, random_signs
from lightx2v.quant.calibration.solved import grid_of, solvable, solved_leaves
from lightx2v.quant.formats import dequantize_leaves, quantize_leaves
from lightx2v.quant.hadamard import rotate, rotation_size
from lightx2v.quant.spec import FP8_CHANNEL, INT8_CHANNEL, MXFP4, NF4, NF4_DOUBLE, NVFP4, QSpec

SPECS = [
    INT8_CHANNEL,
    QSpec("int8", "group", 64),
    QSpec("int8", "group", 32, symmetric=False),
    QSpec("int4", "group", 128),
    QSpec("int4", "channel", symmetric=False),
    QSpec("int3", "group", 64, symmetric=False),
    QSpec("int2", "group", 32),
    NF4,
    NF4_DOUBLE,
    QSpec("fp4", "group", 64),
    NVFP4,
    MXFP4,
]
"""One of each kind of leaves."""


def data(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs a few of whose channels are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[: max(1, k // 64)]] *= 40
    return torch.randn(n, k, generator=generator) / k**0.5, x


@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(max_examples=8, deadline=None)
@given(n=st.sampled_from([1, 3, 8]), k=st.sampled_from([32, 64, 130, 200]), seed=st.integers(0, 99))
def test_solved_weights_are_stored_as_quantized_ones_are(spec: QSpec, n: int, k: int, seed: int) -> None:
    weight, x = data(n, k, seed)
    grid = grid_of(spec, weight)
    solved = {"nearest": nearest(weight, grid), "gptq": gptq(weight, x.T @ x, grid)}
    if isinstance(grid, IntegerGrid) and not grid.symmetric:
        solved["hqq"] = hqq(weight, grid.bits, grid.size)
    assert torch.equal(weight, data(n, k, seed)[0])
    plain = quantize_leaves(weight, spec)
    for name, groups in solved.items():
        leaves = solved_leaves(groups, spec, weight)
        assert {leaf: (tensor.dtype, tensor.shape) for leaf, tensor in leaves.items()} == {
            leaf: (tensor.dtype, tensor.shape) for leaf, tensor in plain.items()
        }
        values = dequantize_leaves(leaves, spec)[:, :k]
        # Scales of scales are rounded after the weight was solved.
        rough = 0.02 if spec == NF4_DOUBLE else 1e-5
        torch.testing.assert_close(values, dequantize(groups, grid), rtol=rough, atol=rough * float(weight.abs().max()))
        if name == "nearest":
            usual = dequantize_leaves(plain, spec)[:, :k]
            # Ties may go the other way, and groups that are filled up may have other scales.
            assert float((values - usual).norm()) <= 0.1 * float((usual - weight).norm()) or k % max(spec.size, 8)


def test_specs_without_a_grid_are_refused() -> None:
    for spec in (FP8_CHANNEL, QSpec("mxfp8", "group", 32)):
        assert not solvable(spec)
        with pytest.raises(LightX2VError, match="no solver"):
            grid_of(spec, torch.ones(2, 32))


@pytest.mark.parametrize("name", ["int4-g64", "int4-g128-asym", "int3-g64-asym", "int2-g128-asym", "nf4", "int8"])
def test_schemes_of_users_have_solvers(name: str) -> None:
    weight = parse(name).weight
    assert weight is not None and solvable(weight)


@pytest.mark.parametrize(("k", "size"), [(5120, 1024), (13824, 512), (1536, 512), (8960, 256), (7, 1), (64, 64)])
def test_rotations_are_orthogonal(k: int, size: int) -> None:
    assert rotation_size(k) == size
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x * random_signs(k), size)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotate(rotated, size) * random_signs(k), x, rtol=1e-4, atol=1e-5)
    matrix = rotate(torch.eye(size, dtype=torch.float32), size).double()
    signs = torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(min(size, 64))] for i in range(min(size, 64))]
    )
    torch.testing.assert_close(matrix[: len(signs), : len(signs)], signs.double() / math.sqrt(size))


def test_rotations_compile_in_one_graph() -> None:
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    hadamard._matrices.clear()
    compiled = torch.compile(lambda x: hadamard.rotate(x, 512), fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), rotate(x, 512))


def test_signs_are_both_and_the_seeds() -> None:
    signs = random_signs(1000)
    assert signs.unique().tolist() == [-1, 1] and abs(float(signs.mean())) < 0.1
    assert torch.equal(signs, random_signs(1000)) and not torch.equal(signs, random_signs(1000, seed=1))


@pytest.mark.parametrize("rotation", [0, 32])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_solved_for_the_changed_input_holds_for_the_input(rotation: int, scaled: bool) -> None:
    weight, x = data(16, 96)
    multiplier = torch.rand(96, generator=torch.Generator().manual_seed(1)) * random_signs(96) * 3 if scaled else None
    changed = Around(multiplier, rotation).input(x)
    wanted = (changed.T @ changed).double()
    torch.testing.assert_close(fold_gram(x.T @ x, multiplier, rotation).double(), wanted, rtol=1e-3, atol=1e-1)
    down = fold_around(weight, multiplier, rotation)[:4]
    exact = changed.double() @ down.double().T
    torch.testing.assert_close(
        x.double() @ fold_down(down, multiplier, rotation).double().T, exact, rtol=1e-4, atol=1e-3
    )


def test_a_rotation_makes_the_error_of_four_bits_smaller_where_there_are_outliers() -> None:
    weight, x = data(64, 512)
    exact = x.double() @ weight.double().T

    def error(multiplier: Tensor | None, rotation: int) -> float:
        inputs, turned = Around(multiplier, rotation).input(x), fold_around(weight, multiplier, rotation)
        grid = IntegerGrid(4, 0)
        got = fake_quantize(inputs, grid).double() @ fake_quantize(turned, grid).double().T
        return float((got - exact).norm() / exact.norm())

    plain = error(None, 0)
    assert error(None, 512) < 0.8 * plain and error(random_signs(512), 512) < 0.8 * plain
