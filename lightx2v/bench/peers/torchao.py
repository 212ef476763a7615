"""torchao: `quantize_` with the configurations that its documentation gives for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightx2v.bench.peers.base import Peer, Quantize


def _quantizer(config: Callable[[Any], Any]) -> Quantize:
    def quantize(model: nn.Module, names: Sequence[str]) -> None:
        import torchao.quantization as ao

        chosen = set(names)
        ao.quantize_(model, config(ao), filter_fn=lambda module, name: name in chosen)

    return quantize


INT8 = Peer(
    "torchao-int8",
    "int8 weights per channel, int8 activations per token",
    ("torchao",),
    _quantizer(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
)
INT8_WEIGHTS = Peer(
    "torchao-int8-weights",
    "int8 weights per channel, bfloat16 products",
    ("torchao",),
    _quantizer(lambda ao: ao.Int8WeightOnlyConfig()),
)
FP8 = Peer(
    "torchao-fp8",
    "fp8 weights per channel, fp8 activations per token",
    ("torchao",),
    _quantizer(lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())),
)
