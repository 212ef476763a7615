"""The blocks of .gguf files against the `gguf` package, which is ggml's own definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import parse
from lightx2v.quant.gguf import FLOAT_KINDS, QUANTIZABLE, dequantize_blocks, quantize_blocks
from lightx2v.quant.spec import GGUF_KINDS

K = 512


def blocks(kind: str, rows: int = 40, seed: int = 0) -> torch.Tensor:
    """Rows of blocks with random codes and scales of moderate size."""
    layout, random = GGUF_KINDS[kind], np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, K // layout.values, layout.nbytes), dtype=np.uint8)
    if kind in FLOAT_KINDS:
        return torch.randn(rows, K).to(FLOAT_KINDS[kind]).view(torch.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for place in halves.get(kind, (0, 2) if kind.endswith("K") else (0,)):
        scales = (random.standard_normal(raw.shape[:2]) * 0.02).astype(np.float16)
        raw[:, :, place : place + 2] = scales.view(np.uint8).reshape(*raw.shape[:2], 2)
    return torch.from_numpy(raw.reshape(rows, -1))


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_numbers_and_sizes_are_ggmls(kind: str) -> None:
    number = GGMLQuantizationType[kind]
    assert (GGUF_KINDS[kind].number, (GGUF_KINDS[kind].values, GGUF_KINDS[kind].nbytes)) == (
        number.value,
        GGML_QUANT_SIZES[number],
    )


@pytest.mark.parametrize("kind", GGUF_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_the_packages_to_the_last_bit(kind: str, seed: int) -> None:
    raw = blocks(kind, seed=seed)
    typed = raw.numpy().view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    wanted = quants.dequantize(typed, GGMLQuantizationType[kind])
    got = dequantize_blocks(raw, kind)
    assert got.shape == (40, K) and np.array_equal(got.numpy(), wanted) and got.abs().max() > 0
    assert torch.equal(dequantize_blocks(raw, kind, torch.bfloat16), got.bfloat16())


@pytest.mark.parametrize("kind", QUANTIZABLE)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1000.0])
def test_floats_become_the_packages_blocks(kind: str, magnitude: float) -> None:
    weight = torch.randn(20, K) * magnitude
    weight[3] = 0
    wanted = quants.quantize(weight.numpy(), GGMLQuantizationType[kind]).view(np.uint8).reshape(20, -1)
    assert np.array_equal(quantize_blocks(weight, kind).numpy(), wanted)


@pytest.mark.parametrize("kind", GGUF_KINDS)
@pytest.mark.parametrize("library", ["dequantize", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product(kind: str, library: str, dtype: torch.dtype) -> None:
    """Kinds that only llama.cpp makes too."""
    raw, scheme, adapter = blocks(kind), parse(f"gguf-{kind}").with_library(library), LIBRARIES[library]
    packed = adapter.prepare(scheme, {"weight": raw, "weight_type": torch.tensor(GGUF_KINDS[kind].number)})
    assert packed.nbytes == raw.numel() and (packed.n, packed.k) == (40, K)
    x = torch.randn(7, K).to(dtype)
    got = adapter.linear(scheme, x, packed, None).double()
    weight = dequantize_blocks(raw, kind).double()
    size = x.double().abs() @ weight.abs().T
    assert ((got - x.double() @ weight.T).abs() <= size * adapter.caps.rtol + size * torch.finfo(dtype).eps).all()
    assert adapter.unpack(scheme, packed)["weight_type"] == GGUF_KINDS[kind].number


def test_a_kind_that_is_only_read() -> None:
    with pytest.raises(ValueError, match=r"llama\.cpp"):
        quantize_blocks(torch.randn(1, 256), "Q4_K")
