"""UniPC without a wait for the device.

diffusers' UniPCMultistepScheduler copies its scalars to the device of the latents and solves a 2 x 2 system there, in
every step, and the host waits for both. Here the scalars stay in the host's memory, where they are known before the
loop; the operations and their order are the same, so that the results are equal to the bit on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor


class UniPC(UniPCMultistepScheduler):
    """UniPC (Zhao et al. 2023) of order 1 and 2 with B(h) = exp(h) - 1, on x0 = x - sigma * v."""

    def multistep_uni_p_bh_update(self, model_output: Tensor, *args: Any, sample: Tensor, order: int) -> Tensor:
        """The predictor: from `sample` to the next noise level."""
        plain, factor, difference, _ = self._integral(sample, self.step_index + 1, order)
        return plain if difference is None else plain - factor * (0.5 * difference)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *args: Any, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """The corrector: the step from `last_sample` once more, now that the prediction at its end is known."""
        plain, factor, difference, weights = self._integral(last_sample, self.step_index, order)
        correction = weights[-1] * (this_model_output - self.model_outputs[-1])
        return plain - factor * (correction if difference is None else weights[0] * difference + correction)

    def _integral(self, x: Tensor, to: int, order: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What both have in common, for the step to noise level `to`: the first-order result, the factor of what higher
        orders add, the divided difference of the last two predictions, and the weights of the corrector."""
        sigma_t, sigma_s = self.sigmas[to], self.sigmas[to - 1]
        h = _lambda(sigma_t) - _lambda(sigma_s)
        phi_1 = torch.expm1(-h)
        plain = sigma_t / sigma_s * x - (1 - sigma_t) * phi_1 * self.model_outputs[-1]
        factor = (1 - sigma_t) * phi_1
        if order == 1:
            return plain, factor, None, torch.tensor([0.5])
        ratio = (_lambda(self.sigmas[to - 2]) - _lambda(sigma_s)) / h
        difference = (self.model_outputs[-2] - self.model_outputs[-1]) / ratio
        ratios = torch.stack([ratio, torch.ones(())])
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 1 / 2
        system = torch.stack([torch.ones(2), ratios])
        return plain, factor, difference, torch.linalg.solve(system, torch.stack([phi_2 / phi_1, phi_3 * 2 / phi_1]))


def _lambda(sigma: Tensor) -> Tensor:
    """Half of the log signal-to-noise ratio: log(alpha / sigma) with alpha = 1 - sigma."""
    return torch.log(1 - sigma) - torch.log(sigma)
