"""int8 activations under scales that a calibration found: for all tokens, and perhaps another one for later steps.

x = (code - zero) * scale, with one scale and zero point for the whole input. The zero point's part of a product,
-zero * scale * sum_k W[n, k], is the same for every token, and is added with the bias (msModelSlim's `quant_bias`).
With `input_steps`, a request begins with scales found per token; from step `input_steps[1 + i]` of `input_steps[0]` on,
entry i of `input_scale` and `input_zero` holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.quant.numerics import Quantized
from lightx2v.quant.spec import INT8_STEPS, QSpec

STATIC_LEAVES = ("input_scale", "input_zero", "input_steps")


def calibrated_leaves(spec: QSpec) -> tuple[str, ...]:
    """The tensors that activations of `spec` need in a checkpoint."""
    return STATIC_LEAVES if spec == INT8_STEPS else STATIC_LEAVES[: 1 if spec.symmetric else 2]


class StaticInput(nn.Module):
    """The scales of one layer's input, and which of them hold now."""

    scale: Tensor
    zero: Tensor
    sums: Tensor

    def __init__(self, spec: QSpec, leaves: Mapping[str, Tensor], where: str) -> None:
        """Raises CheckpointError, which names `where`, when the scales that `spec` needs are not in `leaves`."""
        super().__init__()
        wanted = STATIC_LEAVES[: 1 if spec.symmetric else 2] if spec != INT8_STEPS else STATIC_LEAVES
        if missing := [leaf for leaf in wanted if leaf not in leaves]:
            raise CheckpointError(
                where, f"missing: {', '.join(missing)}", do="calibrate the model (lightx2v calibrate)"
            )
        scale = leaves["input_scale"].float().reshape(-1)
        zero = leaves["input_zero"].float().reshape(-1) if "input_zero" in leaves else torch.zeros_like(scale)
        steps = leaves["input_steps"].flatten().tolist() if spec == INT8_STEPS else [1, 0]
        if not len(scale) == len(zero) == len(steps) - 1 or steps[1:] != sorted(steps[1:]) or steps[0] < 1:
            sizes = f"{len(scale)} scales, {len(zero)} zero points, steps {steps}"
            raise CheckpointError(where, sizes, allowed="one zero point and one first step, rising, for each scale")
        self.total, self.first = int(steps[0]), [int(step) for step in steps[1:]]
        self.group = -1 if spec == INT8_STEPS else 0
        """The entry that holds now; -1: scales are found per token."""
        self.register_buffer("scale", scale.clone(), persistent=False)
        self.register_buffer("zero", zero.clone(), persistent=False)
        self.has_zero = "input_zero" in leaves
        self.changes = spec == INT8_STEPS

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that it was made of."""
        found = {"input_scale": self.scale}
        if self.has_zero:
            found["input_zero"] = self.zero
        if self.changes:
            found["input_steps"] = torch.tensor([self.total, *self.first], dtype=torch.int32)
        return found

    @property
    def dynamic(self) -> bool:
        """Whether scales are found per token now."""
        return self.group < 0

    def at(self, step: int, steps: int) -> None:
        """Use the scales of `step` of `steps`, which need not be as many as were calibrated."""
        there = step * self.total // steps
        self.group = sum(first <= there for first in self.first) - 1

    def quantize(self, x: Tensor) -> Quantized:
        """int8 codes [M, K] and scales [M, 1], all the same, of x [M, K]."""
        scale, zero = self._now()
        codes = torch.round(x.float() / scale).add_(zero).clamp_(-128, 127).to(torch.int8)
        return Quantized(codes, scale.expand(x.shape[0], 1).contiguous())

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """`bias` [N] with the zero point's part of the product, float32."""
        if not self.has_zero:
            return bias
        scale, zero = self._now()
        offset = self.sums * (zero * scale)
        return -offset if bias is None else bias - offset

    def _now(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both [1]."""
        now = slice(self.group, self.group + 1)
        return self.scale[now], self.zero[now]

    def weigh(self, weight: Tensor, scale: Tensor) -> None:
        """Take the codes [N, K] and scales [N, 1] of the weight, of which only the sums of rows are kept."""
        sums = weight.sum(dim=1, dtype=torch.int64).float() * scale.reshape(-1)
        self.register_buffer("sums", sums, persistent=False)


class StepScales:
    """Tells every layer of a model whose scales change from step to step which of them hold."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps, self._step = steps, -1
        self.inputs = [module for module in model.modules() if isinstance(module, StaticInput) and module.changes]

    def at(self, step: int) -> None:
        """Use the scales of `step`."""
        if step != self._step:
            self._step = step
            for module in self.inputs:
                module.at(step, self.steps)
