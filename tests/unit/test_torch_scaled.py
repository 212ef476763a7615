"""What torch's block-scaled products are given: no device here has them, so their contract is checked instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.errors import ConfigError
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.platform import DeviceInfo
from lightx2v.quant.formats import quantize_leaves
from lightx2v.quant.numerics import Quantized
from tests.numerics.definitions import E2M1, bits

N, K, M = 136, 392, 50
NAMES = ("mxfp8", "mxfp4", "nvfp4", "fp8-pertensor")
SCALED, REFERENCE = LIBRARIES["torch_scaled"], LIBRARIES["reference"]


def made(name: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    scheme = parse(f"{name}-torch")
    assert scheme.library == "torch_scaled" and scheme.weight is not None
    leaves = quantize_leaves(torch.randn(N, K) / 20, scheme.weight)
    if name == "nvfp4":
        leaves["input_global_scale"] = torch.tensor(500.0)
    return scheme, leaves, torch.randn(M, K, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_reversible(name: str) -> None:
    scheme, leaves, _ = made(name)
    unpacked = SCALED.unpack(scheme, SCALED.prepare(scheme, leaves))
    assert unpacked.keys() == leaves.keys()
    for leaf, tensor in leaves.items():
        assert torch.equal(unpacked[leaf].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), leaf


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8-pertensor"])
def test_torch_accepts_shapes_and_dtypes(name: str) -> None:
    """On meta tensors torch checks the call as on a GPU. For mxfp4 it forgets that two codes are in a byte (2.13)."""
    scheme, leaves, x = made(name)
    packed = SCALED.prepare(scheme, leaves)
    codes, scale = SCALED.quantize(scheme, x, packed)
    out = SCALED.gemm(scheme, Quantized(codes.to("meta"), scale.to("meta")), packed.to("meta"), None, torch.float16)
    assert out.shape == (M, N) and out.dtype == torch.float16


def tile_order(scale: Tensor, rows: int) -> np.ndarray:
    """The scales of `rows` rows out of tiles of 128 x 4, by the formula of cuBLAS."""
    flat = scale.flatten()
    values = flat.view(torch.uint8).numpy()
    columns = flat.numel() // (rows + -rows % 128)
    m, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    offset = (m // 128 * (columns // 4) + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    chosen = torch.from_numpy(values[offset]).view(scale.dtype)
    return chosen.double().numpy()


def emulated(
    a: Tensor, b: Tensor, scale_a: list[Tensor], recipe: list[Any], scale_b: list[Tensor], _: Any, **options: Any
) -> Tensor:
    """scaled_mm of block-scaled operands in float64."""
    size = 16 if recipe[0] == F.ScalingType.BlockWise1x16 else 32  # type: ignore[attr-defined]
    assert options["swizzle_a"][0] == options["swizzle_b"][0] == F.SwizzleType.SWIZZLE_32_4_4  # type: ignore[attr-defined]
    operands = []
    for codes, scales in ((a, scale_a), (b.t(), scale_b)):
        packed = codes.dtype == torch.float4_e2m1fn_x2
        values = E2M1[bits(codes.view(torch.uint8), 4)] if packed else codes.double().numpy()
        values = values * tile_order(scales[0], values.shape[0]).repeat(size, axis=1)
        operands.append(values * (scales[1].double().item() if len(scales) > 1 else 1))
        assert values.shape[1] % (4 * size) == 0
    return torch.from_numpy(operands[0] @ operands[1].T).to(options["output_dtype"])


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_blocks_and_scales_are_where_the_product_looks_for_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", emulated)
    scheme, leaves, x = made(name)
    bias = torch.randn(N)
    packed = SCALED.prepare(scheme, leaves)
    got = SCALED.gemm(scheme, SCALED.quantize(scheme, x, packed), packed, bias, torch.float32)
    held = REFERENCE.prepare(scheme, leaves)
    wanted = REFERENCE.gemm(scheme, REFERENCE.quantize(scheme, x, held), held, bias, torch.float32)
    assert (got - wanted).norm() <= 0.005 * wanted.norm()


def test_static_fp8_takes_scales_of_the_weight_and_of_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, **_: Any) -> Tensor:
        assert a.shape[1] % 16 == b.shape[1] % 16 == 0 and scale_a.numel() == scale_b.numel() == 1
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    scheme, leaves, x = made("fp8-pertensor")
    for scale in (leaves["weight_scale"], torch.rand(N, 1)):
        given = {**leaves, "weight_scale": scale, "input_scale": torch.tensor([0.01])}
        packed, held = SCALED.prepare(scheme, given), REFERENCE.prepare(scheme, given)
        got = SCALED.linear(scheme, x.float(), packed, None)
        wanted = REFERENCE.linear(scheme, x.float(), held, None)
        assert (got - wanted).norm() <= 0.005 * wanted.norm()


def test_where_the_hardware_lacks_it() -> None:
    hopper = DeviceInfo("cuda", 0, "H100", (9, 0), 1, 1)
    for name in ("mxfp8", "mxfp4", "nvfp4"):
        with pytest.raises(ConfigError, match=r"needs compute capability 10\.0 or higher, H100 has 9\.0"):
            plan_layer("q", f"{name}-torch", parse(f"{name}-torch"), N, K, device=hopper, fallback=False)
    with pytest.raises(ConfigError, match="torch_scaled: does not compute this scheme"):
        plan_layer("q", "mxfp6-mxfp8-torch", parse("mxfp6-mxfp8-torch"), N, K, device=hopper, fallback=False)
