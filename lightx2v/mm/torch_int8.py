"""Products of int8 codes that torch ships kernels for. Both accumulate in int32, so both are exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.mm.base import Leaves, Packed, rescale
from lightx2v.quant.numerics import Quantized


@torch.library.custom_op("lightx2v::int8_linear_onednn", mutates_args=())
def _int8_linear_onednn(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """int8 codes [M, K] times a weight from onednn.qlinear_prepack, times its channel scales [N]: float32 [M, N].

    oneDNN's fast kernels read unsigned activations, so the codes are shifted by 128 and that is named the zero point.
    """
    shifted = codes.view(torch.uint8) ^ 128
    zeros = torch.zeros(scale.shape[0], dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@_int8_linear_onednn.register_fake
def _(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], scale.shape[0]), dtype=torch.float32)


class OneDnn:
    """oneDNN's int8 product on a CPU. The packed weight takes the place of the codes, at one byte each."""

    name = "onednn"
    words = "oneDNN's int8 product"
    code_bytes = 1

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        has = hasattr(torch.ops.onednn, "qlinear_prepack") and torch.backends.mkldnn.is_available()
        return None if device.type == "cpu" and has else "needs a CPU and a torch with oneDNN"

    def pack(self, leaves: Leaves) -> Packed:
        codes, scale = leaves["weight"], leaves["weight_scale"]
        packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        return Packed(self.name, *codes.shape, weight=packed, scale=scale.reshape(-1).contiguous())

    def unpack(self, packed: Packed) -> Leaves:
        return {"weight": packed.weight.to_dense().t().contiguous(), "weight_scale": packed.scale.view(-1, 1)}

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        product = _int8_linear_onednn(x.codes, packed.weight, packed.scale).mul_(x.scale)
        return product.to(out_dtype) if bias is None else product.add_(bias).to(out_dtype)


class IntMM:
    """torch._int_mm. GPUs want more than 16 rows, and K and N in multiples of 8: zeros fill up."""

    name = "int_mm"
    words = "torch._int_mm"
    code_bytes = 1

    def supports(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, before it is tried."""
        return None if hasattr(torch, "_int_mm") else "needs a torch with _int_mm"

    def pack(self, leaves: Leaves) -> Packed:
        codes = leaves["weight"]
        n, k = codes.shape
        padded = F.pad(codes, (0, -k % 8, 0, -n % 8)).contiguous()
        return Packed(self.name, n, k, weight=padded, scale=leaves["weight_scale"])

    def unpack(self, packed: Packed) -> Leaves:
        return {"weight": packed.weight[: packed.n, : packed.k].contiguous(), "weight_scale": packed.scale}

    def gemm(self, x: Quantized, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        rows = x.codes.shape[0]
        extra = max(17 - rows, 0) if x.codes.device.type != "cpu" else 0
        codes = F.pad(x.codes, (0, -packed.k % 8, 0, extra))
        product = torch._int_mm(codes, packed.weight.t())[:rows, : packed.n]
        return rescale(product, packed, x, bias, out_dtype)
