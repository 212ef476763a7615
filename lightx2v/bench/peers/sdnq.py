"""SDNQ with its quantized products: by OpenVINO on a CPU where that is installed, else by what torch.compile makes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightx2v.bench.peers.base import Peer


def _quantize(model: nn.Module, names: Sequence[str]) -> None:
    import sdnq

    config = sdnq.SDNQConfig(weights_dtype="int8", use_quantized_matmul=True)
    for name in names:
        layer, config = sdnq.sdnq_quantize_layer(model.get_submodule(name), config, param_name=name)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


INT8 = Peer("sdnq-int8", "int8 weights per channel, int8 activations per token", ("sdnq",), _quantize)
