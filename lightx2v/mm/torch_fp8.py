"""Products of float8_e4m3fn codes that torch ships kernels for, and in bfloat16 where there are none.

bfloat16 holds every e4m3 value exactly, so a bfloat16 product of codes rounds only its result, before scaling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm.base import Leaves, Packed, add_bias, rescale
from lightx2v.mm.reference import dequantize_groups
from lightx2v.platform import compute_capability
from lightx2v.quant.numerics import Quantized, dequantize_weight
from lightx2v.quant.spec import FP8_BLOCK128, FP8_CHANNEL, QSpec

_E4M3 = torch.float8_e4m3fn


def _has_bfloat16(device: torch.device) -> str | None:
    if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "this CPU has no bfloat16 product"


class Bfloat16Channels:
    """Channel scales: codes multiplied as bfloat16. That copy takes the place of the codes, at two bytes each."""

    name = "bfloat16"
    words = "fp8 codes multiplied in bfloat16"
    code_bytes = 2
    spec: QSpec = FP8_CHANNEL

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        return _has_bfloat16(device)

    def pack(self, leaves: Leaves) -> Packed:
        weight = leaves["weight"].to(torch.bfloat16)
        return Packed(self.name, *weight.shape, weight=weight, scale=leaves["weight_scale"])

    def unpack(self, packed: Packed) -> Leaves:
        return {"weight": packed.weight.to(_E4M3), "weight_scale": packed.scale}

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        return rescale(_to_bfloat16(x.codes) @ packed.weight.t(), packed, x, bias, out_dtype)


class Bfloat16Blocks:
    """Block scales: weight and activations dequantized to bfloat16, the weight once and instead of its codes."""

    name = "bfloat16_blocks"
    words = "fp8 values multiplied in bfloat16"
    code_bytes = 2
    spec: QSpec = FP8_BLOCK128

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        return _has_bfloat16(device)

    def pack(self, leaves: Leaves) -> Packed:
        codes, scale = leaves["weight"], leaves["weight_scale"]
        n, k = codes.shape
        weight = F.pad(dequantize_weight(codes, scale, self.spec, torch.bfloat16), (0, -k % self.spec.size))
        return Packed(self.name, n, k, weight=weight, scale=scale)

    def unpack(self, packed: Packed) -> Leaves:
        # bfloat16 has four more bits than e4m3: dividing by the scale again rounds back to the code.
        scale = packed.scale.repeat_interleave(128, 0)[: packed.n].repeat_interleave(128, 1)[:, : packed.k]
        return {"weight": (packed.weight[:, : packed.k].float() / scale).to(_E4M3), "weight_scale": packed.scale}

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        values = dequantize_groups(Quantized(_to_bfloat16(x.codes), x.scale), self.spec.size, torch.bfloat16)
        return add_bias(values @ packed.weight.t(), bias, out_dtype)


class ScaledRows:
    """torch._scaled_mm with a scale per row and per column; it gives bfloat16 and wants K and N in multiples of 16."""

    name = "scaled_mm_rows"
    words = "torch._scaled_mm"
    code_bytes = 1

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        return _needs_capability(device, (8, 9))

    def pack(self, leaves: Leaves) -> Packed:
        n, k = leaves["weight"].shape
        scale = F.pad(leaves["weight_scale"].reshape(1, -1), (0, -n % 16), value=1.0)
        return Packed(self.name, n, k, weight=_pad(leaves["weight"], -k % 16, -n % 16), scale=scale)

    def unpack(self, packed: Packed) -> Leaves:
        codes = packed.weight[: packed.n, : packed.k].contiguous()
        return {"weight": codes, "weight_scale": packed.scale[0, : packed.n].reshape(-1, 1).contiguous()}

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        product = torch._scaled_mm(
            _pad(x.codes, -packed.k % 16, 0),
            packed.weight.t(),
            scale_a=x.scale,
            scale_b=packed.scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return add_bias(product[:, : packed.n], bias, out_dtype)


class ScaledBlocks:
    """cuBLAS' product with 1x128 and 128x128 scales, through torch.nn.functional.scaled_mm.

    It wants M in multiples of 4 with column-major scales, and a K-major weight scale padded to multiples of 4 blocks.
    """

    name = "scaled_mm_blocks"
    words = "torch.nn.functional.scaled_mm"
    code_bytes = 1

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        return _needs_capability(device, (9, 0)) if hasattr(F, "scaled_mm") else "needs a torch with scaled_mm"

    def pack(self, leaves: Leaves) -> Packed:
        n, k = leaves["weight"].shape
        scale = F.pad(leaves["weight_scale"], (0, -leaves["weight_scale"].shape[1] % 4)).contiguous()
        return Packed(self.name, n, k, weight=_pad(leaves["weight"], -k % 128, -n % 128), scale=scale)

    def unpack(self, packed: Packed) -> Leaves:
        codes = packed.weight[: packed.n, : packed.k].contiguous()
        return {"weight": codes, "weight_scale": packed.scale[:, : -(-packed.k // 128)].contiguous()}

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        rows = x.codes.shape[0]
        functional: Any = F
        kinds = functional.ScalingType
        product = functional.scaled_mm(
            _pad(x.codes, 0, -rows % 4),
            packed.weight.t(),
            scale_a=F.pad(x.scale, (0, 0, 0, -rows % 4)).t().contiguous().t(),
            scale_recipe_a=kinds.BlockWise1x128,
            scale_b=packed.scale.t(),
            scale_recipe_b=kinds.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )
        return add_bias(product[:rows, : packed.n], bias, out_dtype)


def _to_bfloat16(codes: Tensor) -> Tensor:
    """Finite e4m3 codes as bfloat16, exactly. torch's own conversion on a CPU takes half as long as the product.

    Sign, exponent and mantissa go where bfloat16 has them; 2**120 makes up for the two exponent biases.
    """
    if codes.device.type != "cpu":
        return codes.to(torch.bfloat16)
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-0x7810)
    return bits.view(torch.bfloat16) * 2.0**120


def _pad(codes: Tensor, columns: int, rows: int) -> Tensor:
    """Zero codes appended on the right and below. Padding has no fp8 kernels everywhere, bytes do."""
    if not columns and not rows:
        return codes.contiguous()
    return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(_E4M3)


def _needs_capability(device: torch.device, lowest: tuple[int, int]) -> str | None:
    if device.type == "cpu":
        return "needs a GPU"
    have = compute_capability(device)
    # Devices of other makers have no such number: whether they can is found by trying.
    return (
        None
        if have is None or have >= lowest
        else f"needs compute capability {lowest[0]}.{lowest[1]}, this is {have[0]}.{have[1]}"
    )
