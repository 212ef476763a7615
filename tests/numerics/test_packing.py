"""Packed codes and swizzled scales, against index formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightx2v.quant.packing import (
    pack4,
    pack6,
    pairs6,
    swap_halves,
    swizzle,
    swizzled_shape,
    unpack_marlin,
    unswizzle,
)
from tests.numerics.definitions import bits


def codes(rows: int, columns: int, below: int, seed: int) -> Tensor:
    return torch.randint(0, below, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_puts_the_lowest_bits_first(rows: int, groups: int, seed: int) -> None:
    four, six = codes(rows, 2 * groups, 16, seed), codes(rows, 4 * groups, 64, seed)
    assert np.array_equal(bits(pack4(four), 4), four.numpy())
    assert np.array_equal(bits(pack6(six), 6), six.numpy())
    pairs = pairs6(pack6(six))
    assert torch.equal(pairs & 63, six[:, 0::2].long()) and torch.equal(pairs >> 6, six[:, 1::2].long())
    assert np.array_equal(bits(swap_halves(pack4(four)), 4)[:, 0::2], four[:, 1::2].numpy())
    assert torch.equal(swap_halves(swap_halves(pack4(four))), pack4(four))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 13), seed=st.integers(0, 99))
def test_swizzle_is_the_layout_of_the_kernels(rows: int, columns: int, seed: int) -> None:
    """LightX2V's kernels write the scale of row m and group k at this offset (mxfp6_quant_kernels_sm120.cu)."""
    plain = codes(rows, columns, 256, seed)
    mixed = swizzle(plain)
    assert tuple(mixed.shape) == swizzled_shape(rows, columns) and mixed.shape[0] % 128 == mixed.shape[1] % 4 == 0
    flat, tiles = mixed.flatten().tolist(), -(-columns // 4)
    m, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    offset = (m // 128) * tiles * 512 + (k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4
    assert np.array_equal(np.array(flat)[offset], plain.numpy())
    assert sum(flat) == int(plain.sum()), "the rest is zero"
    assert torch.equal(unswizzle(mixed, rows, columns), plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=str)
def test_swizzle_keeps_the_dtype_and_parts_by_bands_of_rows(dtype: torch.dtype) -> None:
    plain = codes(300, 6, 256, 0)
    mixed = swizzle(plain.view(dtype))
    assert mixed.dtype == dtype and unswizzle(mixed, 300, 6).dtype == dtype
    band = swizzle(plain[128:256])
    assert torch.equal(mixed.view(torch.uint8)[128:256], band)


def marlin(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [K, N] and scales [K/128, N] as Marlin's kernel reads them, element by element."""
    k, n = weight.shape
    packed = np.zeros((k // 16, 2 * n), dtype=np.uint32)
    for row in range(k // 16):
        for part in range(2 * n):
            # A 32-bit word has eight codes of one lane of a warp; 128 words are four tiles of 16 x 16.
            chunk, word = divmod(part, 128)
            lane, tile = divmod(word, 4)
            for nibble, fragment in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                half, r = divmod(fragment, 4)
                i = 2 * (lane % 4) + (0, 1, 8, 9)[r]
                j = 16 * (4 * chunk + tile) + lane // 4 + 8 * half
                packed[row, part] |= int(weight[16 * row + i, j]) << 4 * nibble
    order = [i + 8 * j for i in range(8) for j in range(8)]
    mixed = scale.reshape(-1, 64)[:, order].reshape(scale.shape)
    return torch.from_numpy(packed.astype(np.int32)), mixed


def test_marlin() -> None:
    weight, scale = codes(256, 128, 16, 0), torch.rand(2, 128)
    got, scales = unpack_marlin(*marlin(weight, scale))
    assert torch.equal(got, weight.T) and torch.equal(scales, scale.T)
