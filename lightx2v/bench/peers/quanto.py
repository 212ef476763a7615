"""optimum-quanto with quantized weights, as diffusers uses it; its quantized activations need a calibration."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightx2v.bench.peers.base import Peer, Quantize


def _quantizer(weights: str) -> Quantize:
    def quantize(model: nn.Module, names: Sequence[str]) -> None:
        from optimum import quanto

        quanto.quantize(model, weights=weights, include=list(names))
        quanto.freeze(model)

    return quantize


INT8 = Peer("quanto-int8", "int8 weights per channel, bfloat16 activations", ("optimum.quanto",), _quantizer("qint8"))
FP8 = Peer("quanto-fp8", "fp8 weights per channel, bfloat16 activations", ("optimum.quanto",), _quantizer("qfloat8"))
