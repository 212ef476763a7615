"""Whether the kernels of `kernels.block` may be used on a device: tried once there, against torch. No triton here."""

from __future__ import annotations

from functools import lru_cache

import torch
from loguru import logger
from torch import Tensor
from torch.nn import functional as F

from lightx2v.platform import compute_capability, probe

_TOLERANCE = 1e-4
"""Largest error of a float32 result, in parts of the largest: a wrong index is off by about 1."""


@lru_cache(maxsize=16)
def usable(device: torch.device) -> bool:
    """Whether they run on `device`, an NVIDIA GPU of compute capability 8.0 or higher, and compute what they should."""
    capability = compute_capability(device)
    if capability is None or capability < (8, 0) or probe("triton").version is None:
        return False
    problem = trial(device)
    if problem:
        logger.warning("norms, rotary embedding and gates are computed by torch: {}", problem)
    return problem is None


@torch.no_grad()
def trial(device: torch.device) -> str | None:
    """What is wrong with the kernels on `device`; None where nothing is."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, y, factor, offset = normal(2, 3, 144), normal(2, 3, 144), normal(2, 1, 144), normal(2, 1, 144)
    weight, angle = normal(144), normal(3, 24)
    turned = F.rms_norm(x, (144,), weight, 1e-6).unflatten(-1, (3, 24, 2))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    rotated = torch.view_as_real(torch.view_as_complex(turned.contiguous()) * turn).flatten(2)
    try:
        from lightx2v.kernels import ops

        pairs = {
            "layer_norm": (
                ops.layer_norm(x, factor, offset, 1e-6, torch.float32),
                F.layer_norm(x, (144,), eps=1e-6) * factor + offset,
            ),
            "sum_norm": (
                torch.stack(ops.sum_norm(x, y, factor, factor, offset, 1e-6, torch.float32)),
                torch.stack((x + y * factor, F.layer_norm(x + y * factor, (144,), eps=1e-6) * factor + offset)),
            ),
            "gelu_tanh": (ops.gelu_tanh(x), F.gelu(x, approximate="tanh")),
            "add_gated": (ops.add_gated(x, y, factor), x + y * factor),
            "rms_rope": (ops.rms_rope(x, weight, angle.cos(), angle.sin(), 3, 1e-6), rotated),
        }
    except Exception as error:  # whatever the compiler or the driver raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, (got, wanted) in pairs.items():
        off = float((got - wanted).abs().max() / wanted.abs().max())
        if not off <= _TOLERANCE:
            return f"{name} gives wrong results on this device (off by {off:.2g} of the largest)"
    return None
